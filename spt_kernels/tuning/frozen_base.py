"""What `apply` froze, remembered by fingerprints: a task belongs to exactly those values.

Whoever averages whole models as `d·e + (1-d)·m` rounds what is the same in both, so that frozen
weights drift by a unit in the last place or so. The fingerprints tell that it has happened, and the
model that was copied for averaging still has the values themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..layers import SparseDelta, sparse_deltas, tuned_modules
from ..layers.deltas.held_values import gather
from ..layers.deltas.sparse_delta import hold_values
from ..model.digest import digests_of
from ..model.quantized import inner_tensors, is_quantized, logical_shape, quantization
from .whole import take_cast_heads

_ARRIVES = "_spt_other_base"  # on a model, while a state dict of another base is loaded


class FrozenTensor(NamedTuple):
    """A frozen parameter of the base.

    Attributes:
        dtype: of the parameter.
        shape: of the parameter, or of the matrix that is packed in it.
        digest: of `digests_of`.
        quantization: what it is quantized to, if it is.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str
    quantization: str = ""


class Source:
    """A parameter by its place in a module, which is held weakly.

    A weak reference to the parameter itself would keep `torch.utils.swap_tensors` from it.
    """

    __slots__ = ("_local", "_module")

    def __init__(self, module: nn.Module, local: str) -> None:
        self._module, self._local = weakref.ref(module), local

    def __call__(self) -> Tensor | None:
        """What is there now; None once the module is gone."""
        module = self._module()
        return None if module is None else module._parameters.get(self._local)

    def copied(self, memo: dict[int, Any]) -> Source | None:
        """The same place in a copy that is being made of the module, if there is one."""
        copy = memo.get(id(self._module()))
        return Source(copy, self._local) if isinstance(copy, nn.Module) else None


@dataclass(frozen=True, eq=False)
class FrozenBase:
    """The frozen parameters of a model as `apply` found them.

    Attributes:
        tensors: name of every parameter outside of the head -> what it was.
        sources: name -> the parameter itself, which is tuned since, then that of the model which
            this one was copied from, and so on: where the values may be had from as long as they
            live.
    """

    tensors: Mapping[str, FrozenTensor]
    sources: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        changed: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> FrozenBase:
        """Remember parameters.

        Args:
            model: that has them.
            parameters: name -> parameter.
            changed: name -> positions at which the base has other values, int32, and those.
            known: name -> fingerprint of its values in the base, where that was just taken.
        """
        changed, digests = changed or {}, dict(known or {})
        new = {name: p for name, p in parameters.items() if name not in digests}
        rows = [changed.get(name, (None, None)) for name in new]
        found = digests_of([*new.values()], [row[0] for row in rows], [row[1] for row in rows])
        digests |= dict(zip(new, found, strict=True))
        tensors = {
            name: FrozenTensor(p.dtype, logical_shape(p), digests[name], quantization(p))
            for name, p in parameters.items()
        }
        modules = dict(model.named_modules(remove_duplicate=False))
        places = ((name, *name.rpartition(".")[::2]) for name in parameters)
        return cls(tensors, {name: (Source(modules[m], local),) for name, m, local in places})

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenBase:
        sources = {}
        for name, places in self.sources.items():
            alive = [place for place in places if place() is not None]
            copy = alive[0].copied(memo) if alive else None
            sources[name] = tuple(alive) if copy is None else (copy, *alive)
        return FrozenBase(self.tensors, sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenBase, (self.tensors,)  # another process has no model to look at


def watch_state_dicts(model: nn.Module) -> None:
    """Let a tuned model notice what `load_state_dict` does to its base, unless it is sharded.

    A state dict of the same base, in which averaging has rounded what is frozen, leaves that as it
    is, and brings but the entries that are trained. One of another base, as a checkpoint is for a
    model of random weights, brings that base.
    """
    model.register_load_state_dict_pre_hook(_before_loading)
    model.register_load_state_dict_post_hook(_after_loading)


def unwatch_state_dicts(model: nn.Module) -> None:
    """Undo `watch_state_dicts`."""
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_before_loading, _after_loading):
                del hooks[key]


@torch.no_grad()
def _before_loading(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *_unused: Any
) -> None:
    if any(map(is_sharded, model.parameters())):
        return  # no process has a whole parameter to compare
    take_cast_heads(model, state_dict, prefix)
    kept: dict[str, Tensor] = {}
    rounded: list[tuple[SparseDelta, Tensor]] = []  # what weights of 16 bits hold of deltas
    held = {id(delta.target): delta for delta in sparse_deltas(model).values()}
    positions = {target: delta.index for target, delta in held.items()}
    whole = {target for target, delta in held.items() if delta.whole}  # trained, all of it
    bases = _without_base_values(model, state_dict, prefix)
    for name, own in model.named_parameters():
        loaded = state_dict.get(prefix + name)
        if own.requires_grad or id(own) in whole or not isinstance(loaded, Tensor):
            continue
        if not own.is_meta and (loaded.is_meta or loaded.shape != own.shape):
            return  # whatever becomes of it is for `load_state_dict` to say
        if own.is_meta or not _is_rounded(loaded, own, positions.get(id(own))):
            _check_tells_base(model, state_dict, prefix)
            model.__dict__[_ARRIVES] = True
            return
        kept[prefix + name] = bases[id(own)].base() if id(own) in bases else own.detach()
        delta = None if id(own) in bases else held.get(id(own))
        # fp32 is rounded to nearest, and is made anew; 16 bits may have been rounded at random
        if delta is not None and not delta.beside and own.element_size() < 4:
            entries = gather(loaded, delta.index.to(loaded.device)).to(own)  # [nnz]
            rounded.append((delta, entries))
    hold_values([delta for delta, _ in rounded], [entries for _, entries in rounded])
    state_dict.update(kept)
    for name, module in tuned_modules(model).items():
        _keep_constants(module, state_dict, f"{prefix}{name}." if name else prefix)


def _check_tells_base(model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse weights of another base, with deltas, that may hold these or not.

    Raises:
        RuntimeError: so it is, as in a dict of all named parameters.
    """
    for name, module in tuned_modules(model).items():
        holder: Any = module
        for local, delta in holder.sparse_deltas().items():
            names = (local, *holder.delta_local_names(local))
            keys = [prefix + (f"{name}.{own}" if name else own) for own in names]
            target, values, _, original = keys
            there = state_dict.get(values)
            if delta.whole or delta.beside or target not in state_dict or original in state_dict:
                continue
            if isinstance(there, Tensor) and not there.is_meta and bool(there.any()):
                raise RuntimeError(
                    f"{target} is of another base, and comes with {values} but without {original}, "
                    "so that it may hold base + delta or the base alone: load all of a "
                    "state_dict(), or the weights of the base first and what was trained then"
                )


def _without_base_values(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str
) -> dict[int, SparseDelta]:
    """Deltas by the ids of their targets, of which a state dict has but values of the base."""
    found: dict[int, SparseDelta] = {}
    for name, module in tuned_modules(model).items():
        holder: Any = module
        for local, delta in holder.sparse_deltas().items():
            original = ".".join(filter(None, (name, holder.delta_local_names(local)[2])))
            if not (delta.whole or delta.beside) and prefix + original not in state_dict:
                found[id(delta.target)] = delta
    return found


def _after_loading(model: nn.Module, _keys: Any) -> None:
    arrived = model.__dict__.pop(_ARRIVES, False)
    tuning: Any = model.spt_tuning
    if tuning.frozen is None:
        return
    if arrived:
        parameters = dict(model.named_parameters())
        frozen = {n: parameters[n] for n in tuning.frozen.tensors if n in parameters}
        deltas = {n: d for n, d in sparse_deltas(model).items() if n in frozen}
        inside = {name: d for name, d in deltas.items() if not d.beside}
        changed = {name: (d.index, d.original.detach()) for name, d in inside.items()}
        base = FrozenBase.of(model, frozen, changed)
        model.spt_tuning = replace(tuning, frozen=base)


def _keep_constants(holder: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Positions and base values in a state dict of the same base, if they were averaged too."""
    for local, delta in holder.sparse_deltas().items():
        _, *names = holder.delta_local_names(local)
        constants = (delta.index,) if delta.beside else (delta.index, delta.original)
        own = {f"{prefix}{n}": t for n, t in zip(names, constants, strict=False)}
        pairs = [(state_dict.get(key), constant) for key, constant in own.items()]
        if all(isinstance(loaded, Tensor) and _is_rounded(loaded, o) for loaded, o in pairs):
            state_dict.update(own)


def _is_rounded(loaded: Tensor, own: Tensor, but: Tensor | None = None) -> bool:
    """Whether a tensor is another up to what averaging rounds; positions `but` do not count."""
    if loaded.shape != own.shape:
        return False
    if is_quantized(own):
        parts = inner_tensors(loaded) if is_quantized(loaded) else {"data": loaded}
        mine = inner_tensors(own)  # what is beside packed data is not in a state dict under a name
        return all(n in mine and torch.equal(t.to(own.device), mine[n]) for n, t in parts.items())
    loaded = loaded.detach().to(own.device)
    if loaded.dtype == own.dtype and torch.equal(loaded, own):
        return True
    if not loaded.is_floating_point():
        return False
    # an average wanders by more units in the last place the longer it looks back
    coarsest = max(torch.finfo(t.dtype).eps for t in (loaded, own) if t.is_floating_point())
    numbers = torch.promote_types(loaded.dtype, torch.float32)
    values = own.to(numbers)
    difference = (loaded.to(numbers) - values).abs().reshape(-1)
    if but is not None:
        difference[but.long()] = 0
    allowed = max(2.0**-13, 8 * coarsest)  # in half precision 8, in single a thousand of them
    return bool((difference <= allowed * values.abs().reshape(-1)).all())

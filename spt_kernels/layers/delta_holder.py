"""`DeltaHolder`: what every module with sparse deltas has in common, mixed into its class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .keep_fp32 import keeping_fp32
from .position_index import CheckedIndex, checked_index, position_problem
from .row_major import format_of, put_into
from .sparse_delta import Owner, SparseDelta, WrittenState, tag, untag, write_deltas
from .tuned_class import Shown, change_class, plain_again, plain_class, plain_twin, tuned_class

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DeltaHolder(Owner):
    """A module some of whose parameters are frozen but for a sparse delta.

    For a parameter `bias` it registers the Parameter `bias_delta` (fp32), and has the constants
    `bias_index` (int32) and `bias_original`; for the main parameter of its class just `delta`,
    `index` and `original`, unless the layer has attributes of these names. The parameters
    themselves keep their names.

    The constants move with the module and are in its state dict, as copies, but they are no
    buffers: whoever averages a model's buffers or state dict, as an EMA does, or broadcasts them,
    must not change positions. A delta without any positions has the attributes alone: no parameter
    and no entry of a state dict is empty.
    """

    _plain_class: ClassVar[type[nn.Module] | None] = None  # see `tuned_class`
    _main_parameter: ClassVar[str] = ""

    @staticmethod
    def name_for(plain: type[nn.Module]) -> tuple[str, str, str]:
        """Name, module and qualified name of the class of a tuned `plain`."""
        return plain.__name__, plain.__module__, plain.__qualname__

    @staticmethod
    def reader(name: str) -> property:
        """How a parameter is read that `tuned_class` was asked to let the tuner read."""
        raise NotImplementedError

    def hold_delta(self, local: str, index: Tensor | CheckedIndex, name: str = "index") -> None:
        """Freeze a parameter but for the positions in `index`, where a zero delta is added.

        Args:
            local: name of the parameter in this module.
            index: see `checked_index`.
            name: of the argument that `index` came from, for messages.
        """
        target = self._parameters.get(local)
        if target is None:
            raise ValueError(f"{name} was given, but the {type(self).__name__} has no {local}")
        if target.dtype not in DTYPES:
            raise TypeError(f"{local} must be fp32, bf16, fp16 or fp64, got {target.dtype}")
        positions = checked_index(name, index, local, target).index  # [nnz] int32
        delta_name, index_name, original_name = self.delta_local_names(local)
        for taken in (delta_name, index_name, original_name):
            if hasattr(self, taken):
                raise ValueError(f"{type(self).__name__} has an attribute {taken} of its own")
        target.requires_grad_(False)
        values = torch.zeros(positions.numel(), dtype=torch.float32, device=target.device)
        # what is empty never gets a gradient, which data parallelism would wait for
        delta = nn.Parameter(values, requires_grad=len(values) > 0)
        if len(values):
            self.register_parameter(delta_name, delta)
            self._spt_states[local] = WrittenState()
        else:
            self.__dict__[delta_name] = delta
            self.__dict__["_spt_empty"] = (*self._spt_empty_names, local)
        self.__dict__[index_name] = positions
        self.__dict__[original_name] = _gather(target, positions)
        self._make_row_major([local])
        if len(values):
            self._spt_states[local].record(delta)
            self._tag(self.sparse_deltas()[local])

    def added_names(self) -> list[str]:
        """What tuning has added: names of parameters and of attributes, but for `_spt_...`."""
        held = (*self._spt_states, *self._spt_empty_names)
        return [name for local in held for name in self.delta_local_names(local)]

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta."""
        found = {}
        for local in (*self._spt_states, *self._spt_empty_names):
            delta_name, index_name, original_name = self.delta_local_names(local)
            written = self._spt_states.get(local)
            delta = self.__dict__[delta_name] if written is None else self._parameters[delta_name]
            found[local] = SparseDelta(
                target=self._parameters[local],  # type: ignore[arg-type]
                delta=delta,  # type: ignore[arg-type]
                index=self.__dict__[index_name],
                original=self.__dict__[original_name],
                written=WrittenState() if written is None else written,
            )
        return found

    @Shown
    def plain(self) -> nn.Module:
        """A module as this one was before it was tuned, with the parameters as they are now."""
        return plain_twin(self, self.added_names())

    @classmethod
    def delta_local_names(cls, local: str) -> tuple[str, str, str]:
        """Names of the delta, index and original of a parameter."""
        prefix = "" if local == cls._main_parameter else f"{local}_"
        return f"{prefix}delta", f"{prefix}index", f"{prefix}original"

    def write_stale_deltas(self) -> None:
        """Write what has changed since the last forward; to be called by every eager forward."""
        self.__dict__["_spt_called"] = True
        stale = []
        for local, written in self._spt_states.items():
            written.by_optimizer = False
            delta_name, _, _ = self.delta_local_names(local)
            if not written.matches(self._parameters[delta_name]):  # type: ignore[arg-type]
                stale.append(local)
        if stale:
            deltas = self.sparse_deltas()
            write_deltas([deltas[local] for local in stale])

    @property
    def _spt_states(self) -> dict[str, WrittenState]:
        # not `setdefault`, which `torch.compile` of torch 2.11 cannot trace here
        if "_spt_written" not in self.__dict__:
            self.__dict__["_spt_written"] = {}
        states: dict[str, WrittenState] = self.__dict__["_spt_written"]
        return states

    @property
    def _spt_empty_names(self) -> tuple[str, ...]:
        """Parameters with a delta that has no positions."""
        return self.__dict__.get("_spt_empty", ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeltaHolder:
        """Move or cast as any module, but keep deltas fp32 and write them into the cast weights."""
        before = self.sparse_deltas()
        fresh = {local: d.is_fresh for local, d in before.items()}
        dtypes = {local: d.target.dtype for local, d in before.items()}
        self._leave_row_major()
        super()._apply(keeping_fp32(fn, [d.delta for d in before.values()]), recurse)  # type: ignore[arg-type]
        self._make_row_major(before)
        for local, delta in before.items():
            delta_name, index_name, original_name = self.delta_local_names(local)
            self.__dict__[index_name] = _moved(delta.index, fn(delta.index))
            self.__dict__[original_name] = fn(delta.original)
            if delta_name in self.__dict__:
                values = delta.delta.detach().to(self.__dict__[index_name].device)
                self.__dict__[delta_name] = nn.Parameter(values, requires_grad=False)
        after = self.sparse_deltas()
        if any(after[local].index.device != d.index.device for local, d in before.items()):
            self._index_changed()
        for local in self._spt_states:
            delta = after[local]
            self._tag(delta)
            if fresh[local] and delta.target.dtype == dtypes[local]:
                delta.written.record(delta.delta)
            elif delta.target.device.type != "meta":
                delta.write()
        return self

    def _make_row_major(self, names: Iterable[str]) -> None:
        """Put parameters into the order of their positions, and remember the format they had."""
        for local in names:
            target = self._parameters[local]
            assert target is not None
            if not target.is_contiguous():
                self.__dict__.setdefault("_spt_formats", {})[local] = format_of(target)
                put_into(target, torch.contiguous_format)

    def _leave_row_major(self) -> None:
        """Give parameters the memory format back that they had."""
        for local, memory_format in self.__dict__.pop("_spt_formats", {}).items():
            put_into(self._parameters[local], memory_format)  # type: ignore[arg-type]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, constant in self._constants().items():
            destination[prefix + name] = constant.clone()  # for reading: writes go nowhere

    def _constants(self) -> dict[str, Tensor]:
        names = [n for local in self._spt_states for n in self.delta_local_names(local)[1:]]
        return {name: self.__dict__[name] for name in names}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = self._problems_of_constants(state_dict, prefix)
        if problems:  # an out-of-range position must never reach a kernel
            error_msgs.extend(problems)
            return
        own_unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, own_unexpected, error_msgs
        )
        constants = self._constants()
        empty = [n for local in self._spt_empty_names for n in self.delta_local_names(local)]
        known = {prefix + name for name in constants}
        # as they were saved once
        known |= {prefix + name for name in empty if not len(state_dict.get(prefix + name, ()))}
        unexpected_keys += [key for key in own_unexpected if key not in known]
        for name, constant in constants.items():
            if prefix + name in state_dict:
                loaded = state_dict[prefix + name].detach()
                if constant.device.type == "meta":  # its parameters may just have been assigned
                    self.__dict__[name] = loaded.to(dtype=constant.dtype, copy=True)
                else:
                    constant.copy_(loaded)
            elif strict:
                missing_keys.append(prefix + name)
        self._make_row_major(self._spt_states)  # parameters may just have been assigned
        self._index_changed()
        deltas = self.sparse_deltas()
        for local in self._spt_states:
            delta = deltas[local]
            self._tag(delta)
            _, _, original_name = self.delta_local_names(local)
            if prefix + local in state_dict and prefix + original_name not in state_dict:
                delta.original.copy_(_gather(delta.target, delta.index))  # plain base weights
            if _holds(delta):
                delta.written.record(delta.delta)
            else:
                delta.write()

    def _problems_of_constants(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What is wrong with the positions and originals in a state dict."""
        problems = []
        for local in (*self._spt_states, *self._spt_empty_names):
            _, index_name, original_name = self.delta_local_names(local)
            for name in (index_name, original_name):
                value, own = state_dict.get(prefix + name), self.__dict__[name]
                if value is None:
                    continue
                if not isinstance(value, Tensor) or value.shape != own.shape:
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    problems.append(f"{prefix}{name} must be {list(own.shape)}, got {got}")
                elif name == index_name and value.dtype not in (torch.int32, torch.int64):
                    problems.append(f"{prefix}{name} must be int32 or int64, got {value.dtype}")
                elif name == index_name and value.device.type != "meta":
                    numel = self._parameters[local].numel()  # type: ignore[union-attr]
                    problem = position_problem(value, numel)
                    problems += [f"{prefix}{name} {problem}"] if problem else []
        return problems

    def _tag(self, delta: SparseDelta) -> None:
        """Let a delta lead back to this module."""
        tag(delta.delta, self)

    def _index_changed(self) -> None:
        """Bring up to date what is derived from an index."""

    def __getstate__(self) -> dict[str, Any]:
        # Versions mean nothing in another process or copy: only whether it is fresh travels
        inherited = getattr(super(), "__getstate__", None)  # absent from `object` before 3.11
        state = dict(self.__dict__ if inherited is None else inherited())
        deltas = self.sparse_deltas()
        state["_spt_written"] = {local: deltas[local].is_fresh for local in self._spt_states}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fresh = state.pop("_spt_written", {})
        super().__setstate__(state)
        self.__dict__["_spt_written"] = {local: WrittenState() for local in fresh}
        for local, delta in self.sparse_deltas().items():
            self._tag(delta)
            if delta.original.dtype != delta.target.dtype:  # a copy may be made in another dtype
                _, _, original_name = self.delta_local_names(local)
                self.__dict__[original_name] = delta.original.to(delta.target.dtype)
            if fresh.get(local):
                delta.written.record(delta.delta)


def _moved(index: Tensor, result: Tensor) -> Tensor:
    """An index after a move of its module: wherever that puts it, the positions stay the same."""
    if index.device.type == "meta" and result.device.type != "meta":
        # `to_empty`: the positions come with a state dict; these are valid at least
        return torch.arange(len(index), dtype=index.dtype, device=result.device)
    stays = result.device == index.device and type(result) is type(index)
    return index if stays else result.to(index.dtype)


def _gather(target: Tensor, index: Tensor) -> Tensor:
    return target.detach().reshape(-1).index_select(0, index)


@torch.no_grad()
def _holds(delta: SparseDelta) -> bool:
    """Whether the target holds base + delta already, up to one rounding, stochastic or not."""
    if delta.target.device.type == "meta" or delta.index.numel() == 0:
        return True
    truth = delta.original.double() + delta.delta.double()
    error = (_gather(delta.target, delta.index).double() - truth).abs()
    numbers = torch.finfo(delta.target.dtype)
    return bool((error <= numbers.eps * truth.abs() + numbers.tiny).all())


def tune_in_place(
    module: nn.Module, tuner: Any, tune: Callable[[Any], None], reads: tuple[str, ...] = ()
) -> None:
    """Give a module its tuned class and what that holds; on an error it is as it was.

    Args:
        module: plain, or tuned in a way that `tuner` goes on with.
        tuner: subclass of `DeltaHolder`.
        tune: called with the module once it has its class.
        reads: see `tuned_class`.
    """
    before = type(module)
    flags = [(p, p.requires_grad) for p in module._parameters.values() if p is not None]
    change_class(module, tuned_class(tuner, module, reads))
    try:
        tune(module)
    except BaseException:
        if before is plain_class(module):
            untune(module)
        module.__class__ = before
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def untune(module: nn.Module) -> None:
    """Make a tuned module plain again: the same object, its parameters as they are written now."""
    assert isinstance(module, DeltaHolder)
    module._leave_row_major()
    for delta in module.sparse_deltas().values():
        untag(delta.target)
    plain_again(module, module.added_names())

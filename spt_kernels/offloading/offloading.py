"""`offload`: which blocks of a model have their frozen matrices on the host, set and taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import nn

from ..layers import write_deltas
from ..model.check import check_trainable_itself
from ..model.quantized import quantized_names
from .choice import Choice, nbytes_of
from .schedule import Schedule
from .streamed_block import StreamedBlock
from .words import WHAT

_BLOCKS, _HOOKS = "_spt_streamed", "_spt_offload_hooks"  # attributes of an offloaded model


@dataclass(frozen=True)
class Offload:
    """What of a model is on the host, as `offload` has decided.

    Attributes:
        what: of `offload`, as are `keep_bytes`, `ahead` and `device`.
        streamed: block -> bytes of its frozen matrices, in the order of the model.
        kept: block -> bytes of the frozen matrices that stay on the device.
        forward_only: the blocks, streamed or not, that come before anything that is trained.
    """

    what: str
    keep_bytes: int
    ahead: int
    device: torch.device
    streamed: Mapping[str, int]
    kept: Mapping[str, int]
    forward_only: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("streamed", "kept"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def host_bytes(self) -> int:
        """What is on the host; a copy in 16 bits comes on top where autocast is used."""
        return sum(self.streamed.values())


@torch.inference_mode(False)
@torch.no_grad()
def offload(
    model: nn.Module,
    what: str = "frozen",
    *,
    keep_bytes: int = 0,
    ahead: int = 1,
    device: torch.device | str | None = None,
) -> Offload:
    """Keep frozen weights on the host, and each on the device only while its block runs; in place.

    Of each block (a transformer's layer, a residual block) the frozen matrices go to one pinned
    buffer on the host. A hook before the block's forward fetches them by one copy, on a stream of
    its own while the block before still computes; after the forward they are given back, and
    fetched once more for the backward where a gradient goes through the block. What is trained, and
    biases, norms, stem and head, stay on the device. Results are the same bits as without.

    A sparse delta is trained as always: base + delta is written whenever its weight is fetched,
    instead of by the optimizer, whichever it is; stochastic rounding is refused. `save_delta`,
    `load_delta`, `merge` and `unload` bring all weights to the device while they work. A state
    dict holds all values, those of offloaded weights on the host.

    Call it after `apply` or a method has decided what is frozen, and again when that changes; each
    call replaces the one before. It wants blocks that are called as modules, and cannot be
    combined with `torch.compile`, `capture_step` or a copy of the model.

    Args:
        model: tuned or plain, on one device.
        what: `"frozen"`: of all blocks. `"forward-only"`: of those before anything that is trained,
            which the backward does not reach: they are fetched once in a step. `"nothing"`: all
            weights are brought to the device for good.
        keep_bytes: frozen matrices that may stay on the device nevertheless: whole blocks, the last
            ones first.
        ahead: how many blocks are fetched ahead; the device holds one more than that at a time.
        device: where the model computes, and what is not offloaded is moved to. None: where it is.
            A model that does not fit the card comes from the CPU by this.

    Returns:
        What was done, which is also `model.spt_offload`; of `"nothing"` there is none.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; the model is compiled, wrapped, sharded or on several
            devices, or has no block with a frozen matrix of its own. Nothing is changed.
    """
    home, origin = _check(model, what, keep_bytes, ahead, device)
    if what == "nothing":
        _bring_back(model, home)
        return Offload(what, keep_bytes, ahead, home, {}, {}, ())
    choice = _choose(model, what, keep_bytes)
    if not choice.streamed:
        named = "keep_bytes" if choice.kept else "model"
        raise ValueError(f"{named}: {_nothing_to_stream(model, what, choice)}")
    side = torch.cuda.Stream(home) if home.type == "cuda" else None  # type: ignore[no-untyped-call]
    former = _forget(model)
    for block in former:
        block.end()  # what is to stay on the device is moved there with the rest
    schedule = Schedule(ahead)
    blocks: list[StreamedBlock] = []
    vars(model)[_BLOCKS] = blocks
    try:
        for name, matrices in choice.streamed.items():
            module = model.get_submodule(name)
            blocks.append(StreamedBlock(name, module, matrices, home, schedule, side, model))
        _move_rest(model, former, blocks, home)
        write_deltas(delta for block in former for _, delta in block.deltas())
    except BaseException:
        _bring_back(model, origin)
        raise
    loading = model.register_load_state_dict_pre_hook(_refuse_to_load)
    hooks: Any = model._load_state_dict_pre_hooks
    hooks.move_to_end(loading.id, last=False)
    vars(model)[_HOOKS] = [
        loading,
        model.register_forward_pre_hook(schedule.begin_model),
        model.register_forward_hook(schedule.end_model, always_call=True),
    ]
    made = Offload(
        *(what, keep_bytes, ahead, home),
        {block.name: block.nbytes for block in blocks},
        {name: nbytes_of(matrices) for name, matrices in choice.kept.items()},
        choice.forward_only,
    )
    vars(model)["spt_offload"] = made
    return made


def why_not_offloaded(model: nn.Module, what: str) -> str:
    """Why no weights of a model would be on the host by `offload(model, what)`; empty if some."""
    choice = _choose(model, what, 0)
    return "" if choice.streamed else _nothing_to_stream(model, what, choice)


def blocks_on_host(model: nn.Module) -> list[StreamedBlock]:
    """The streamed blocks of a model; none where it is not offloaded."""
    found: list[StreamedBlock] = vars(model).get(_BLOCKS, [])
    return found


def is_streamed(model: nn.Module) -> bool:
    """Whether weights of a model are on the host, be it by itself or what is around it."""
    return next(_streamed_within(model), None) is not None


def _streamed_within(model: nn.Module) -> Iterator[StreamedBlock]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            block = getattr(hook, "__self__", None)
            if isinstance(block, StreamedBlock):
                yield block


def _offloaded(model: nn.Module) -> list[nn.Module]:
    """What is offloaded in a model, the model itself, and what is around it."""
    within = [module for module in model.modules() if "spt_offload" in vars(module)]
    around = (block.root() for block in _streamed_within(model))
    return list(dict.fromkeys([*within, *(root for root in around if root is not None)]))


@contextlib.contextmanager
def brought_back(model: nn.Module) -> Iterator[None]:
    """Within it all weights of a model are on its device; they are offloaded anew afterwards.

    Where nothing is left that could be, as once all is trainable again, they stay.
    """
    held = [(module, vars(module)["spt_offload"]) for module in _offloaded(model)]
    for module, _ in held:
        _bring_back(module)
    try:
        yield
    finally:
        for module, was in held:
            if _choose(module, was.what, was.keep_bytes).streamed:
                offload(
                    *(module, was.what),
                    keep_bytes=was.keep_bytes,
                    ahead=was.ahead,
                    device=was.device,
                )


@torch.inference_mode(False)
@torch.no_grad()
def _bring_back(model: nn.Module, device: torch.device | None = None) -> None:
    """Put all weights on a device, by default that on which the model computes, for good."""
    blocks = blocks_on_host(model)
    # all of it before anything is changed, as there may be no room
    values = [block.values_on(device or block.device) for block in blocks]
    _forget(model)
    for block, own in zip(blocks, values, strict=True):
        block.end(own)
    if device is not None:
        model.to(device)
    write_deltas(delta for block in blocks for _, delta in block.deltas())


def _forget(model: nn.Module) -> list[StreamedBlock]:
    """Let a model no longer count as offloaded; the blocks that were streamed, and are still."""
    state = vars(model)
    blocks: list[StreamedBlock] = state.pop(_BLOCKS, [])
    state.pop("spt_offload", None)
    for hook in state.pop(_HOOKS, []):
        hook.remove()
    return blocks


def _move_rest(
    model: nn.Module,
    former: list[StreamedBlock],
    blocks: list[StreamedBlock],
    device: torch.device,
) -> None:
    """Move what is not streamed, out of the buffers of blocks that were streamed before."""
    streamed = {id(matrix.parameter) for block in blocks for matrix in block.matrices}
    for matrix in (matrix for block in former for matrix in block.matrices):
        if id(matrix.parameter) not in streamed:
            matrix.parameter.data = matrix.parameter.data.to(device, copy=True)
    rest = (t for t in (*model.parameters(), *model.buffers()) if id(t) not in streamed)
    if any(tensor.device != device for tensor in rest):
        model._apply(lambda t: t if id(t) in streamed else t.to(device))


def _choose(model: nn.Module, what: str, keep_bytes: int) -> Choice:
    on_host = {id(m.parameter) for block in blocks_on_host(model) for m in block.matrices}
    return Choice.of(model, what, keep_bytes, on_host)


def _check(
    model: Any, what: str, keep_bytes: int, ahead: int, device: Any
) -> tuple[torch.device, torch.device]:
    """Where the model shall compute, and where it is."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if what not in WHAT:
        raise ValueError(f"what must be one of {', '.join(WHAT)}, got {what!r}")
    for name, number in (("keep_bytes", keep_bytes), ("ahead", ahead)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    check_trainable_itself(model, "offload", may_be_offloaded=True)
    for name, kind in () if what == "nothing" else quantized_names(model).items():
        raise ValueError(
            f"{name} is quantized to {kind}: quantized weights stay on the device, and are small "
            "there"
        )
    if any(vars(m).get("_compiled_call_impl") is not None for m in model.modules()):
        raise ValueError(
            "model: a part of it is compiled, which has its weights where they are: offload the "
            "model without compile()"
        )
    parts = [m for m in model.modules() if m is not model and "spt_offload" in vars(m)]
    if parts:
        raise ValueError(
            f"model: a {type(parts[0]).__name__} within it is offloaded by itself: bring that back "
            "with spt.offload(part, 'nothing') first"
        )
    origin = _device_of(model)
    return origin if device is None else _as_device(device), origin


def _device_of(model: nn.Module) -> torch.device:
    made = vars(model).get("spt_offload")
    if made is not None:
        device: torch.device = made.device
        return device
    found = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(found) != 1:
        where = ", ".join(sorted(map(str, found))) or "none, as it has no parameters"
        raise ValueError(f"model: expected all of it on one device, got {where}")
    return _as_device(found.pop())


def _as_device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"device must be 'cpu' or a CUDA device, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or a CUDA device, got {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that there is, got {found} without a CUDA device")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if found.type == "cuda" and found.index >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {found}"
        )
    return found


def _nothing_to_stream(model: nn.Module, what: str, choice: Choice) -> str:
    kind = type(model).__name__
    if choice.kept:
        most = sum(map(nbytes_of, choice.kept.values()))
        return f"what can be offloaded of {kind} are {most:,} bytes, and all may stay"
    if what == "forward-only":
        return (
            f"no block of {kind} with a frozen matrix comes before all that is trained; "
            "what='frozen' offloads the others"
        )
    return f"expected blocks with frozen matrices of their own, {kind} has none"


def _refuse_to_load(*_: Any) -> NoReturn:
    raise ValueError(
        "model is offloaded: bring its weights back with spt.offload(model, 'nothing') before "
        "load_state_dict"
    )

"""`DeltaHolder`: what every module with sparse deltas has in common, mixed into its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ...distributed.sharded import is_sharded
from ...model.quantized import is_quantized
from ...ops.dtypes import FLOATS_AND_FP64
from ..keep_fp32 import keeping_fp32
from .doubt import WATCHED, doubt, doubt_again
from .held_values import gather
from .name_in_model import told_as
from .position_index import CheckedIndex, checked_index
from .saved_deltas import SavedDeltas
from .sparse_delta import tag, write_deltas


class DeltaHolder(SavedDeltas):
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

    _name_prefix: ClassVar[str] = ""  # without one a tuned class is called as the plain one

    @classmethod
    def name_for(cls, plain: type[nn.Module]) -> tuple[str, str, str]:
        """Name, module and qualified name of the class of a tuned `plain`."""
        if not cls._name_prefix:
            return plain.__name__, plain.__module__, plain.__qualname__
        name = f"{cls._name_prefix}{plain.__name__}"
        return name, cls.__module__, name

    @staticmethod
    def reader(name: str) -> property:
        """How a parameter is read that `tuned_class` was asked to let the tuner read."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """Follow a delta that becomes another tensor, as `fully_shard` puts its shard there."""
        before = self._parameters.get(name) if isinstance(value, nn.Parameter) else None
        if before is not None and (is_sharded(value) or is_sharded(before)):
            self._parameters[name] = value  # all else would read what is half exchanged
        else:
            super().__setattr__(name, value)
        if isinstance(value, nn.Parameter):
            for state in self._spt_states.values():
                if state.name == name:
                    tag(value, self)  # type: ignore[arg-type]
                    state.is_sharded |= is_sharded(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse in the place of a tuned parameter one that does not hold what is tuned.

        The next write would put base values of the one that was there into it.
        """
        before = self._parameters.get(name)
        if before is not None and param is not None and name in self._spt_locals:
            self._check_holds(name, before, param)
        super().register_parameter(name, param)

    def _check_holds(self, local: str, before: Tensor, param: nn.Parameter) -> None:
        is_loading = "_spt_loading" in self.__dict__  # which gives it values of the same parameter
        if param is before or is_loading or is_sharded(before) or is_sharded(param):
            return
        delta = self.sparse_deltas()[local]
        is_alike = not delta.beside and param.shape == before.shape and param.dtype == before.dtype
        if not (is_alike and _is_same_at(delta.index, before, param)):
            raise ValueError(
                f"{told_as(self)}.{local} is tuned and cannot be another parameter, in which "
                "nothing is: put that there before measure_sensitivity, or once the task is merged "
                "or unloaded"
            )

    def train(self, mode: bool = True, *others: Any, **named: Any) -> Any:
        """Switch as the plain module, and write what has changed, as compiled forwards do not.

        An eager forward after it also writes what was changed without a trace: it is here that
        averages are copied to a model through `.data`.
        """
        if not torch.compiler.is_compiling() and self._spt_states and not (mode and self.training):
            write_deltas(
                d for d in self.sparse_deltas().values() if d.index.numel() and not d.is_fresh
            )
            doubt(self)
        return super().train(mode, *others, **named)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse copies of `nn.DataParallel`, whose parameters are plain attributes of each."""
        raise RuntimeError(
            f"{told_as(self)} is tuned, and nn.DataParallel's copies of it would not find their "
            "deltas: use DistributedDataParallel, a process for each GPU, or merge the task first"
        )

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
        beside = is_quantized(target)
        if target.dtype not in FLOATS_AND_FP64 and not beside:
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
        original = values.new_empty(0) if beside else gather(target, positions)
        if len(values):
            self.register_parameter(delta_name, delta)
        else:
            self.__dict__[delta_name] = delta
            self.__dict__["_spt_empty"] = (*self._spt_empty_names, local)
        self.__dict__[index_name] = positions
        self.__dict__[original_name] = original
        if beside:
            self.__dict__["_spt_beside"] = (*self._spt_beside_names, local)
            self._tag(self.sparse_deltas()[local])
            return
        if len(values):
            self._spt_states[local] = self._new_state(local)
        self._make_row_major([local])
        if len(values):
            self._spt_states[local].record(delta)
            self._tag(self.sparse_deltas()[local])
            doubt(self, WATCHED)

    def hold_whole(self, local: str, values: nn.Parameter | None = None) -> None:
        """Freeze a parameter of 16 bits and train `<local>_fp32`, its values in fp32, in its place.

        Args:
            local: name of the parameter in this module.
            values: what another module holds of the same parameter; None makes them.
        """
        target = self._parameters[local]
        assert target is not None
        name = f"{local}_fp32"
        if hasattr(self, name):
            raise ValueError(f"{type(self).__name__} has an attribute {name} of its own")
        target.requires_grad_(False)
        self.__dict__["_spt_whole"] = (*self._spt_whole_names, local)
        _, index_name, original_name = self.delta_local_names(local)
        every = torch.arange(target.numel(), dtype=torch.int32, device=target.device)
        self.__dict__[index_name] = every
        self.__dict__[original_name] = target.detach().new_zeros(target.numel())
        self._make_row_major([local])
        own = nn.Parameter(target.detach().float()) if values is None else values
        self.register_parameter(name, own)
        self._spt_states[local] = self._new_state(local)
        self._spt_states[local].record(own)
        self._tag(self.sparse_deltas()[local])
        doubt(self, WATCHED)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeltaHolder:
        """Move or cast as any module, but keep deltas fp32 and write them into the cast weights."""
        before = self.sparse_deltas()
        fresh = {local: d.is_fresh for local, d in before.items()}
        dtypes = {local: d.target.dtype for local, d in before.items()}
        self._leave_row_major()
        tags = [(p, _tags_of(p)) for p in self._parameters.values() if p is not None]
        super()._apply(keeping_fp32(fn, [d.delta for d in before.values()]), recurse)  # type: ignore[arg-type]
        for parameter, told in tags:  # which goes where `torch.utils.swap_tensors` has put the rest
            vars(parameter).update(told)
        self._make_row_major(before)
        for local, delta in before.items():
            delta_name, index_name, original_name = self.delta_local_names(local)
            self.__dict__[index_name] = _moved(delta.index, fn(delta.index))
            original = fn(delta.original)
            self.__dict__[original_name] = original.zero_() if delta.whole else original
            if delta_name in self.__dict__:
                # not moved: nothing is in it, and from `meta` nothing can be
                values = torch.empty_like(delta.delta, device=self.__dict__[index_name].device)
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
        doubt_again(self)
        return self


def _is_same_at(index: Tensor, before: Tensor, after: Tensor) -> bool:
    if before.is_meta or after.is_meta:
        return True
    held, given = gather(before, index), gather(after.to(before.device), index)
    return bool(((held == given) | (held.isnan() & given.isnan())).all())


def _tags_of(parameter: Tensor) -> dict[str, Any]:
    return {name: value for name, value in vars(parameter).items() if name.startswith("_spt_")}


def _moved(index: Tensor, result: Tensor) -> Tensor:
    """An index after a move of its module: wherever that puts it, the positions stay the same."""
    if index.device.type == "meta" and result.device.type != "meta":
        # `to_empty`: the positions come with a state dict; these are valid at least
        return torch.arange(len(index), dtype=index.dtype, device=result.device)
    stays = result.device == index.device and type(result) is type(index)
    return index if stays else result.to(index.dtype)

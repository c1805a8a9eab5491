"""`DeltaHolder`: what every module with sparse deltas has in common, mixed into its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .keep_fp32 import keeping_fp32
from .position_index import checked_index, position_problem
from .sparse_delta import SparseDelta, WrittenState, tag, write_deltas

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DeltaHolder(nn.Module):
    """A module some of whose parameters are frozen but for a sparse delta.

    For a parameter `bias` it registers the Parameter `bias_delta` (fp32), and the buffers
    `bias_index` (int32) and `bias_original`; for the main parameter of its class just `delta`,
    `index` and `original`. The parameters themselves keep their names.
    """

    _main_parameter: ClassVar[str] = ""

    def hold_delta(self, local: str, index: Tensor, name: str = "index") -> None:
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
        positions = checked_index(name, index, local, target)  # [nnz] int32
        delta_name, index_name, original_name = self.delta_local_names(local)
        target.requires_grad_(False)
        delta = torch.zeros(positions.numel(), dtype=torch.float32, device=target.device)
        # an empty one never gets a gradient, which data parallelism would wait for
        self.register_parameter(delta_name, nn.Parameter(delta, requires_grad=len(delta) > 0))
        self.register_buffer(index_name, positions)
        self.register_buffer(original_name, _gather(target, positions))
        self._spt_states[local] = WrittenState()
        delta_ = self.sparse_deltas()[local]
        delta_.written.record(delta_.delta)
        tag(delta_.delta, self)

    def release_deltas(self) -> None:
        """Forget all deltas: the parameters stay as they are written now."""
        for local in self._spt_states:
            delta_name, index_name, original_name = self.delta_local_names(local)
            del self._parameters[delta_name]
            del self._buffers[index_name], self._buffers[original_name]
        for name in ("_spt_written", "_spt_called", "spt_name"):
            self.__dict__.pop(name, None)

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta."""
        found = {}
        for local, written in self._spt_states.items():
            delta_name, index_name, original_name = self.delta_local_names(local)
            found[local] = SparseDelta(
                target=self._parameters[local],  # type: ignore[arg-type]
                delta=self._parameters[delta_name],  # type: ignore[arg-type]
                index=self._buffers[index_name],  # type: ignore[arg-type]
                original=self._buffers[original_name],  # type: ignore[arg-type]
                written=written,
            )
        return found

    @property
    def spt_was_called(self) -> bool:
        """Whether its forward has ever run eagerly."""
        return bool(self.__dict__.get("_spt_called", False))

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
            delta = self._parameters[self.delta_local_names(local)[0]]
            if not written.matches(delta):  # type: ignore[arg-type]
                stale.append(local)
        if stale:
            deltas = self.sparse_deltas()
            write_deltas([deltas[local] for local in stale])

    @property
    def _spt_states(self) -> dict[str, WrittenState]:
        return self.__dict__.setdefault("_spt_written", {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeltaHolder:
        """Move or cast as any module, but keep deltas fp32 and write them into the cast weights."""
        before = self.sparse_deltas()
        fresh = {local: d.is_fresh for local, d in before.items()}
        dtypes = {local: d.target.dtype for local, d in before.items()}
        super()._apply(keeping_fp32(fn, [d.delta for d in before.values()]), recurse)  # type: ignore[arg-type]
        if any(
            d.index.device != before[local].index.device
            for local, d in self.sparse_deltas().items()
        ):
            self._index_changed()
        for local, delta in self.sparse_deltas().items():
            tag(delta.delta, self)
            if not delta.target.is_contiguous():  # flat positions need it, channels last or not
                delta.target.data = delta.target.data.contiguous()
            if fresh[local] and delta.target.dtype == dtypes[local]:
                delta.written.record(delta.delta)
            elif delta.target.device.type != "meta":
                delta.write()
        return self

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
        for local in self._spt_states:
            index_key = prefix + self.delta_local_names(local)[1]
            index = state_dict.get(index_key)
            numel = self._parameters[local].numel()  # type: ignore[union-attr]
            problem = position_problem(index, numel) if isinstance(index, Tensor) else ""
            if problem:  # an out-of-range position must never reach a kernel
                error_msgs.append(f"{index_key} {problem}")
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self._index_changed()
        for local, delta in self.sparse_deltas().items():
            tag(delta.delta, self)
            names = self.delta_local_names(local)
            if prefix + local in state_dict and prefix + names[2] not in state_dict:
                delta.original.copy_(_gather(delta.target, delta.index))  # plain base weights
            if _holds(delta):
                delta.written.record(delta.delta)
            else:
                delta.write()

    def _index_changed(self) -> None:
        """Bring up to date what is derived from an index."""

    def __getstate__(self) -> dict[str, Any]:
        # Versions mean nothing in another process or copy: only whether it is fresh travels
        inherited = getattr(super(), "__getstate__", None)  # absent from `object` before 3.11
        state = dict(self.__dict__ if inherited is None else inherited())
        state["_spt_written"] = {local: d.is_fresh for local, d in self.sparse_deltas().items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fresh = state.pop("_spt_written", {})
        super().__setstate__(state)
        self.__dict__["_spt_written"] = {local: WrittenState() for local in fresh}
        for local, delta in self.sparse_deltas().items():
            tag(delta.delta, self)
            if fresh[local]:
                delta.written.record(delta.delta)


def _gather(target: Tensor, index: Tensor) -> Tensor:
    return target.detach().reshape(-1).index_select(0, index)


@torch.no_grad()
def _holds(delta: SparseDelta) -> bool:
    """Whether the target holds base + delta already, up to one rounding, stochastic or not."""
    if delta.target.device.type == "meta" or delta.index.numel() == 0:
        return True
    truth = delta.original.double() + delta.delta.double()
    error = (_gather(delta.target, delta.index).double() - truth).abs()
    spacing = (
        torch.finfo(delta.target.dtype).eps * truth.abs() + torch.finfo(delta.target.dtype).tiny
    )
    return bool((error <= spacing).all())

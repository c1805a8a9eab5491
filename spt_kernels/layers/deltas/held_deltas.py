"""`HeldDeltas`: the deltas that a module has, by the names of the parameters they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from ...ops.torch_internals import count_dispatch_modes, is_transformed
from ..tuned_class import Shown, plain_twin
from .doubt import settle
from .name_in_model import told_as
from .row_major import format_named, format_of, name_of_format, put_into
from .sparse_delta import Owner, SparseDelta, owner_of, tag, write_deltas
from .written_state import WrittenState

_TAKES_OUT = "weight_norm, spectral_norm and pruning put others in its place"
_WHEN = "do it before measure_sensitivity or once the task is merged"


class HeldDeltas(Owner):
    """What is found under which name in a module with deltas; `DeltaHolder` has them held."""

    _plain_class: ClassVar[type[nn.Module] | None] = None  # see `tuned_class`
    _main_parameter: ClassVar[str] = ""

    def added_names(self) -> list[str]:
        """What tuning has added: names of parameters and of attributes, but for `_spt_...`."""
        return [name for local in self._spt_locals for name in self.delta_local_names(local)]

    def sparse_deltas(self) -> dict[str, SparseDelta]:
        """Local parameter name -> its sparse delta."""
        found = {}
        for local in self._spt_locals:
            delta_name, index_name, original_name = self.delta_local_names(local)
            written, of_none = self._spt_states.get(local), local in self._spt_empty_names
            delta = self.__dict__[delta_name] if of_none else self._own_parameter(delta_name)
            found[local] = SparseDelta(
                target=self._own_parameter(local),
                delta=delta,
                index=self.__dict__[index_name],
                original=self.__dict__[original_name],
                written=WrittenState() if written is None else written,
                whole=local in self._spt_whole_names,
                beside=local in self._spt_beside_names,
            )
        return found

    def _own_parameter(self, name: str) -> nn.Parameter:
        """A parameter that tuning relies on."""
        parameter = self._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"{told_as(self)}.{name} is gone, as {_TAKES_OUT}: undo that, and {_WHEN}"
            )
        return parameter

    def __delattr__(self, name: str) -> None:
        """Refuse to lose what tuning relies on, as a parametrization of it would have it."""
        if name in self._parameters and name in (*self._spt_locals, *self.added_names()):
            raise ValueError(
                f"{told_as(self)}.{name} is tuned and cannot be taken out, as {_TAKES_OUT}: {_WHEN}"
            )
        super().__delattr__(name)

    @Shown
    def plain(self) -> nn.Module:
        """A module as this one was before it was tuned, with the parameters as they are now."""
        return plain_twin(self, self.added_names())

    def delta_local_names(self, local: str) -> tuple[str, str, str]:
        """Names of the delta, index and original of a parameter."""
        if local in self._spt_whole_names:
            return f"{local}_fp32", f"_spt_{local}_index", f"_spt_{local}_original"
        prefix = "" if local == self._main_parameter else f"{local}_"
        return f"{prefix}delta", f"{prefix}index", f"{prefix}original"

    def write_stale_deltas(self) -> None:
        """Write what has changed since the last forward; to be called by every eager forward."""
        own = self.__dict__  # each lookup through the module would cost every layer in every step
        own["_spt_called"] = True
        states = own.get("_spt_written")
        if not states:
            return
        if "_spt_doubted" in own and not (is_transformed() or count_dispatch_modes()):
            settle(self)  # which those who note each call must not see
        parameters, stale = own["_parameters"], []
        for local, written in states.items():
            written.by_optimizer = False
            if not written.matches(parameters.get(written.name)):
                stale.append(local)
        if stale and not is_transformed():  # such a forward reads no weight, see `computed`
            deltas = self.sparse_deltas()
            write_deltas([deltas[local] for local in stale])

    def _new_state(self, local: str) -> WrittenState:
        delta_name, index_name, _ = self.delta_local_names(local)
        if local not in self._spt_whole_names:
            state = WrittenState(delta_name, index_name)
            state.shape = self._own_parameter(local).shape
            return state
        # what is tied to another module's is written once for both
        shared: Any = owner_of(self._parameters[delta_name])  # type: ignore[arg-type]
        states = [] if shared is None else shared._spt_states.values()
        same = [state for state in states if state.name == delta_name]
        return same[0] if same else WrittenState(delta_name)

    @property
    def _spt_states(self) -> dict[str, WrittenState]:
        # not `setdefault`, which `torch.compile` of torch 2.11 cannot trace here
        if "_spt_written" not in self.__dict__:
            self.__dict__["_spt_written"] = {}
        states: dict[str, WrittenState] = self.__dict__["_spt_written"]
        return states

    @property
    def _spt_locals(self) -> tuple[str, ...]:
        """Parameters with a delta of any kind."""
        every = (*self._spt_states, *self._spt_empty_names, *self._spt_beside_names)
        return tuple(dict.fromkeys(every))

    @property
    def _spt_empty_names(self) -> tuple[str, ...]:
        """Parameters with a delta that has no positions."""
        return self.__dict__.get("_spt_empty", ())

    @property
    def _spt_whole_names(self) -> tuple[str, ...]:
        """Parameters of 16 bits that are trained whole."""
        return self.__dict__.get("_spt_whole", ())

    @property
    def _spt_beside_names(self) -> tuple[str, ...]:
        """Quantized parameters, which a delta is kept beside of."""
        return self.__dict__.get("_spt_beside", ())

    def _make_row_major(self, names: Iterable[str]) -> None:
        """Put parameters into the order of their positions, and remember the format they had."""
        for local in names:
            target = self._parameters[local]
            assert target is not None
            if local not in self._spt_beside_names and not target.is_contiguous():
                formats = self.__dict__.setdefault("_spt_formats", {})
                formats[local] = name_of_format(format_of(target))
                put_into(target, torch.contiguous_format)
            values = (
                self._parameters.get(f"{local}_fp32") if local in self._spt_whole_names else None
            )
            if values is not None:
                put_into(values, torch.contiguous_format)

    def _leave_row_major(self) -> None:
        """Give parameters the memory format back that they had."""
        for local, name in self.__dict__.pop("_spt_formats", {}).items():
            put_into(self._parameters[local], format_named(name))  # type: ignore[arg-type]

    def _tag(self, delta: SparseDelta) -> None:
        """Let a delta lead back to this module."""
        tag(delta.delta, self)

    def _tag_all(self) -> None:
        """Let everything that is trained lead back to this module."""
        for delta in self.sparse_deltas().values():
            self._tag(delta)

    def _index_changed(self) -> None:
        """Bring up to date what is derived from an index."""

"""`SavedDeltas`: how a module with deltas is written into and read from state dicts and pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.sharded import is_sharded
from ...model.quantized import logical_numel
from .doubt import doubt, doubt_again
from .held_deltas import HeldDeltas
from .held_values import gather, holds
from .position_index import position_problem
from .row_major import name_of_format


class SavedDeltas(HeldDeltas):
    """The constants of deltas, which are no buffers, go along with the parameters."""

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, constant in self._constants().items():
            destination[prefix + name] = constant.clone()  # for reading: writes go nowhere

    def _constants(self) -> dict[str, Tensor]:
        held = [local for local in self._spt_states if local not in self._spt_whole_names]
        names = [name for local in held for name in self.delta_local_names(local)[1:]]
        beside = [local for local in self._spt_beside_names if local not in self._spt_empty_names]
        names += [self.delta_local_names(local)[1] for local in beside]
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
        self.__dict__["_spt_loading"] = True  # what is assigned are the same parameter's values
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, own_unexpected, error_msgs
            )
        finally:
            del self.__dict__["_spt_loading"]
        constants = self._constants()
        empty = [n for local in self._spt_empty_names for n in self.delta_local_names(local)]
        known = {prefix + name for name in constants}
        # as they were saved once
        known |= {prefix + name for name in empty if not len(state_dict.get(prefix + name, ()))}
        unexpected_keys += [key for key in own_unexpected if key not in known]
        # what is derived of the same positions stays, as a captured step reads it
        is_same = not local_metadata.get("assign_to_params_buffers", False)
        for name, constant in constants.items():
            if prefix + name in state_dict:
                loaded = state_dict[prefix + name].detach()
                if not constant.is_floating_point():
                    is_same = is_same and _are_equal(constant, loaded)
                if constant.device.type == "meta":  # its parameters may just have been assigned
                    self.__dict__[name] = loaded.to(dtype=constant.dtype, copy=True)
                else:
                    constant.copy_(loaded)
            elif strict:
                missing_keys.append(prefix + name)
        self._follow_from_meta()
        self._make_row_major(self._spt_states)  # parameters may just have been assigned
        if not is_same:
            self._index_changed()
        deltas = self.sparse_deltas()
        for local in self._spt_states:
            delta = deltas[local]
            self._tag(delta)
            delta.written.local = None
            delta_name, _, original_name = self.delta_local_names(local)
            told_by = delta_name if delta.whole else original_name
            if prefix + local in state_dict and prefix + told_by not in state_dict:
                # plain base weights
                if is_sharded(delta.target):
                    error_msgs.append(
                        f"{prefix}{local} is sharded, and {prefix}{told_by} is not in the state "
                        "dict: load the weights of a base before fully_shard, and give every "
                        "process all of a tuned model's, which broadcast_from_rank0 does not"
                    )
                    continue
                if delta.whole:
                    delta.delta.data.copy_(delta.target)
                else:
                    delta.original.copy_(gather(delta.target, delta.index))
            # of what is sharded no process knows whether another one has to write
            if not is_sharded(delta.target) and holds(delta):
                delta.written.record(delta.delta)
            else:
                delta.write()
        doubt_again(self)

    def _follow_from_meta(self) -> None:
        """Put deltas without positions, which no state dict has, where their targets are by now."""
        for local in self._spt_empty_names:
            target = self._parameters[local]
            for name in self.delta_local_names(local):
                held = self.__dict__[name]
                if held.is_meta and target is not None and not target.is_meta:
                    empty = torch.empty_like(held, device=target.device)
                    is_delta = isinstance(held, nn.Parameter)
                    made = nn.Parameter(empty, requires_grad=False) if is_delta else empty
                    self.__dict__[name] = made

    def _problems_of_constants(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What is wrong with the positions and originals in a state dict."""
        problems = []
        for local in self._spt_locals:
            _, index_name, original_name = self.delta_local_names(local)
            for name in (index_name, original_name):  # not in it of what is trained whole
                value, own = state_dict.get(prefix + name), self.__dict__[name]
                if value is None:
                    continue
                if not isinstance(value, Tensor) or value.shape != own.shape:
                    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    problems.append(f"{prefix}{name} must be {list(own.shape)}, got {got}")
                elif name == index_name and value.dtype not in (torch.int32, torch.int64):
                    problems.append(f"{prefix}{name} must be int32 or int64, got {value.dtype}")
                elif name == index_name and value.device.type != "meta":
                    numel = logical_numel(self._parameters[local])  # type: ignore[arg-type]
                    problem = position_problem(value, numel)
                    problems += [f"{prefix}{name} {problem}"] if problem else []
        return problems

    def __getstate__(self) -> dict[str, Any]:
        # Versions mean nothing in another process or copy: only whether it is fresh travels
        inherited = getattr(super(), "__getstate__", None)  # absent from `object` before 3.11
        state = dict(self.__dict__ if inherited is None else inherited())
        deltas = self.sparse_deltas()
        state["_spt_written"] = {local: deltas[local].is_fresh for local in self._spt_states}
        if "_spt_doubted" in state:  # which knows tensors by what they are here
            state["_spt_doubted"] = state["_spt_doubted"].left
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        fresh, left = state.pop("_spt_written", {}), state.pop("_spt_doubted", None)
        if "_spt_formats" in state:  # by name; before 0.9.0 the formats themselves
            held = state["_spt_formats"].items()
            state["_spt_formats"] = {local: name_of_format(own) for local, own in held}
        super().__setstate__(state)
        self.__dict__["_spt_written"] = {local: self._new_state(local) for local in fresh}
        for local, delta in self.sparse_deltas().items():
            self._tag(delta)
            if delta.beside:
                continue
            if delta.original.dtype != delta.target.dtype:  # a copy may be made in another dtype
                _, _, original_name = self.delta_local_names(local)
                self.__dict__[original_name] = delta.original.to(delta.target.dtype)
            if fresh.get(local):
                delta.written.record(delta.delta)
        if left is not None:
            doubt(self, left)


def _are_equal(positions: Tensor, loaded: Tensor) -> bool:
    return not positions.is_meta and torch.equal(positions, loaded.to(positions))

"""Which modules a plan touches, and how each is tuned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers import (
    AdapterConv2d,
    AdapterLinear,
    LoraConv2d,
    LoraLinear,
    QuantizedAdapterLinear,
    QuantizedDeltaLinear,
    QuantizedLoraLinear,
    SparseDeltaConv2d,
    SparseDeltaLinear,
    attach_parameter,
    is_tuned,
    tune_in_place,
    tune_norm,
)
from ..layers.deltas.position_index import CheckedIndex, checked_index
from ..model import is_pointwise
from ..model.parameter_info import fused_parts
from ..model.plain_layer import runs_as_conv2d, runs_as_linear
from ..model.quantized import is_quantized, matrix_of, quantized_matrices
from ..model.tied import check_own_memory, sharing_names
from ..plan import AdapterSpec, LoraSpec, Plan


@dataclass(frozen=True, eq=False)
class Place:
    """A module that the plan touches, or whose quantized matrix needs a backward of ours.

    Attributes:
        name: of the module.
        module: as it is.
        positions: local parameter name -> positions, on the parameter's device, checked.
        spec: of the structured module on its weight, if any.
        reads_itself: whether the model reads its parameters itself, as BEiT, Swin V2 and, in eval
            mode, torch's encoder layer do.
    """

    name: str
    module: nn.Module
    positions: dict[str, CheckedIndex] = field(default_factory=dict)
    spec: LoraSpec | AdapterSpec | None = None
    reads_itself: bool = False

    @property
    def is_read(self) -> bool:
        """Whether its parameters are found by those who read them, not by calls of it alone."""
        module = self.module
        if self.reads_itself or "forward" in vars(module):  # which a forward of ours would not be
            return True
        is_layer = is_linear(module) or runs_as_conv2d(module)
        return not (_is_norm(module) or (is_layer and self.positions.keys() <= {"weight", "bias"}))

    def tune(self) -> None:
        """Tune the module where it is; its freshly frozen weights are the same."""
        module, positions, spec = self.module, self.positions, self.spec
        of_delta, of_lora, of_adapter = _tuners(module)
        if self.is_read:
            for local, index in positions.items():
                attach_parameter(module, local, index)
        elif _is_norm(module):
            tune_norm(module, positions)
        elif positions or of_delta is QuantizedDeltaLinear:
            weight: Tensor = module.weight  # type: ignore[assignment]
            nothing = torch.empty(0, dtype=torch.int32, device=weight.device)
            index = positions.get("weight", CheckedIndex(nothing, weight))
            tune_in_place(module, of_delta, lambda own: own._hold(index, positions.get("bias")))
        if spec is not None:
            structured = of_lora if isinstance(spec, LoraSpec) else of_adapter
            tune_in_place(module, structured, lambda own: own.put_on(spec))
        if self.name:
            vars(module)["_spt_name"] = self.name  # for messages


def _tuners(module: nn.Module) -> tuple[Any, Any, Any]:
    """What tunes a matrix: by a delta, by a LoRA, by an Adapter."""
    if isinstance(module, nn.Conv2d):
        return SparseDeltaConv2d, LoraConv2d, AdapterConv2d
    if matrix_of(module) is not None:
        return QuantizedDeltaLinear, QuantizedLoraLinear, QuantizedAdapterLinear
    return SparseDeltaLinear, LoraLinear, AdapterLinear


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` does, with a weight that may be quantized."""
    return runs_as_linear(module) or matrix_of(module) is not None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower()


def places_of(
    model: nn.Module, plan: Plan, parameters: Mapping[str, nn.Parameter], coarse: Collection[str]
) -> list[Place]:
    """Every touched module, in the plan's order, and then the other Linears that are quantized.

    Those get an empty delta: what the quantizer has may keep a float copy for the backward.

    Args:
        model: plain.
        plan: for it.
        parameters: of the model, by their first names.
        coarse: those of 16 bits that are trained whole, which is done where they are read.
    """
    read = {name.rpartition(".")[0] for name in coarse}
    modules, fused = dict(model.named_modules()), fused_parts(model)
    found: dict[str, Place] = {}
    for name, positions in plan.unstructured.items():
        module_name, _, local = name.rpartition(".")
        module = modules[module_name]
        is_read = module_name in read or module in fused or _reads_itself(plan, module_name)
        new = Place(module_name, module, reads_itself=is_read)
        place = found.setdefault(module_name, new)
        on_device = positions.to(parameters[name].device)
        if is_read and is_quantized(parameters[name]):
            raise ValueError(
                f"{name} is quantized, and the model reads it itself instead of calling its layer, "
                "so that nothing can be trained beside it: leave it out with exclude=... in "
                "measure_sensitivity"
            )
        place.positions[local] = checked_index(
            f"plan.unstructured[{name!r}]", on_device, name, parameters[name]
        )
    for name, spec in plan.structured.items():
        module_name, _, local = name.rpartition(".")
        module = modules[module_name]
        is_matrix = is_linear(module) or (runs_as_conv2d(module) and is_pointwise(module))
        is_fused = module in fused
        if local != "weight" or is_fused or not is_matrix or "forward" in vars(module):
            own = " with a forward of its own" if "forward" in vars(module) else ""
            own = " that nn.TransformerEncoderLayer reads in eval mode" if is_fused else own
            raise ValueError(
                f"{name} cannot take a LoRA or an Adapter: expected the weight of a plain "
                f"nn.Linear or 1×1 nn.Conv2d, got a {type(module).__name__}{own}; leave it out "
                "with exclude=... in measure_sensitivity, or give Sensitivity.from_tensors "
                "info=describe(model)"
            )
        place = found.get(module_name, Place(module_name, module))
        found[module_name] = replace(place, spec=spec)
    for module_name, module, _ in quantized_matrices(model):
        found.setdefault(module_name, Place(module_name, module))
    return list(found.values())


def untouched_layers(
    model: nn.Module, trained: Collection[nn.Parameter]
) -> list[nn.Linear | nn.Conv2d]:
    """The plain Linears and convolutions of a model, none of whose parameters are trained.

    Those before the first tuned module are left out: no backward comes there.

    Args:
        model: tuned already as the plan has it.
        trained: parameters that are trained whole.
    """
    whole = {id(parameter) for parameter in trained}
    modules = list(model.modules())
    first = next((n for n, module in enumerate(modules) if is_tuned(module)), len(modules))
    return [
        module
        for module in modules[first:]
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and (runs_as_linear(module) or runs_as_conv2d(module))
        and not is_tuned(module)
        and "forward" not in vars(module)
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not is_lazy(module.weight)
        and not any(id(parameter) in whole for parameter in module.parameters(recurse=False))
    ]


def _reads_itself(plan: Plan, module_name: str) -> bool:
    names = (f"{module_name}.{local}" if module_name else local for local in ("weight", "bias"))
    return any(name in plan.info and plan.info[name].is_read for name in names)


def check_places(
    every: list[tuple[str, nn.Parameter]], places: list[Place], head: tuple[str, ...]
) -> None:
    """Raise unless each touched parameter has one place, outside of the head, and can be tuned.

    A head may be tied to something else as one parameter, whose gradient is that of all its places.
    """
    parameters, shared = dict(every), sharing_names(every)
    check_own_memory(head, parameters, shared)
    for place in places:
        touched = {*place.positions, *(["weight"] if place.spec else [])}
        for local in sorted(touched):
            name = f"{place.name}.{local}" if place.name else local
            parameter = parameters[name]
            check_own_memory([name], parameters, shared)
            if name in shared:
                raise ValueError(
                    f"{name} is shared with {shared[name][0]}: tied weights cannot be tuned by a "
                    f"plan, only trained whole, with head=[{name!r}] in measure_sensitivity"
                )
            if name in head:
                raise ValueError(f"{name} is part of the head, which is trained as a whole")
            if local not in place.positions:
                nothing = torch.empty(0, dtype=torch.int32, device=parameter.device)
                checked_index(f"plan.structured[{name!r}]", nothing, name, parameter)

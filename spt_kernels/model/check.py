"""What a model must be before it is measured or tuned: itself, with weights that can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from .parameter_info import ParameterInfo
from .quantized import is_quantized, matrix_of, state_of

# What a tensor of torchao has set where more than the weight is quantized, or the input rescaled
_OF_THE_INPUT = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
IN_A_BANK = "_spt_bank_group"  # attribute of a layer that runs with a part of a `TaskBank`'s task
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def check_not_wrapped(model: nn.Module, verb: str) -> None:
    """Raise `ValueError` where a model is compiled, scripted or wrapped for data parallelism."""
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model is wrapped in a {type(model).__name__}: {verb} the model itself, before it is "
            "compiled or wrapped"
        )


def check_trainable_itself(model: nn.Module, verb: str, *, may_be_offloaded: bool = False) -> None:
    """Raise unless `model` is the very module whose names and parameters training will meet.

    Args:
        model: any module.
        verb: what is about to be done to it, for messages: `"measure"`.
        may_be_offloaded: whether weights may be on the host at times.

    Raises:
        ValueError: it is compiled, scripted, offloaded or wrapped for data parallelism, or runs
            with a task of a bank; or a parameter has no values, is sharded, was made in inference
            mode, or is quantized in a way that is not served.
    """
    check_not_wrapped(model, verb)
    if not may_be_offloaded:
        check_not_offloaded(model, verb)
    for prefix, module in model.named_modules():
        if IN_A_BANK in vars(module):
            raise ValueError(
                f"cannot {verb} the model while a TaskBank has a task on it, with a part on "
                f"{prefix}: call bank.use(None) first, and copy the model after that"
            )
        for name, parameter in module.named_parameters(prefix, recurse=False):
            problem = _quantization_problem(name, module, parameter)
            if problem is not None:
                raise ValueError(problem)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode, and can never be trained: build the "
                "model outside of that"
            )
        if is_sharded(parameter):
            raise ValueError(f"{name} is sharded: {verb} the model first, then call fully_shard")
        if parameter.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the weights of the model first")


def check_not_offloaded(model: nn.Module, verb: str) -> None:
    """Raise a `ValueError` where `spt.offload` has put weights of a model on the host."""
    if any("spt_offload" in vars(module) for module in model.modules()):
        raise ValueError(
            f"model is offloaded: bring its weights back with spt.offload(model, 'nothing') to "
            f"{verb} it"
        )


def check_are_matrices(wanted: Mapping[str, ParameterInfo], quantized: Mapping[str, str]) -> None:
    """Raise `ValueError` where what is wanted is quantized, and no matrix of a Linear.

    Args:
        wanted: name -> what is to be measured.
        quantized: of `quantized_names`.
    """
    for name, what in wanted.items():
        if what.kind == "other" and name in quantized:
            raise ValueError(
                f"{name} is quantized to {quantized[name]} and is no weight of a Linear, so that "
                "nothing can be trained beside it: leave it out of include"
            )


def check_are_real(wanted: Iterable[str], parameters: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where what is wanted has no squared gradient as a number in fp32.

    Args:
        wanted: names of what is to be measured.
        parameters: of the model, by name.
    """
    for name in wanted:
        if not (parameters[name].is_floating_point() or is_quantized(parameters[name])):
            raise ValueError(
                f"{name} is of {parameters[name].dtype}, and only floating parameters can be "
                "measured and tuned: leave it out of include"
            )


def check_head_is_float(head: Iterable[str], quantized: Mapping[str, str]) -> None:
    """Raise `ValueError` where a head, which is trained whole, is among `quantized_names`."""
    for name in head:
        if name in quantized:
            raise ValueError(
                f"{name} of the head is quantized to {quantized[name]}, and a head is trained "
                "whole: leave it out when the model is quantized (a filter_fn of torchao's "
                "quantize_, llm_int8_skip_modules of transformers), give the model a new one, or "
                "name another head with head=... in measure_sensitivity"
            )


def _quantization_problem(name: str, module: nn.Module, parameter: Any) -> str | None:
    """Why a layer with a quantized parameter cannot be measured or tuned; None if it can.

    A quantized parameter of something else than a Linear is none: it stays as it is.
    """
    if not is_quantized(parameter) or not isinstance(module, nn.Linear):
        return None
    kind = type(parameter).__name__
    state = state_of(parameter)
    if kind == "Int8Params":
        return (
            f"{name} is of bitsandbytes' {type(module).__name__}, which rounds what comes in on "
            "a card as well: take 4 bits (Linear4bit), or torchao's Int8WeightOnlyConfig"
        )
    if kind == "NF4Tensor":
        return (
            f"{name} is torchao's NF4Tensor, which is quantized anew whenever it is copied: take "
            "Linear4bit of bitsandbytes, or torchao's Int4WeightOnlyConfig"
        )
    if kind == "Params4bit" and state is None:
        return f"{name} is not quantized yet: move the model to its device first, model.to(device)"
    if getattr(state, "packing_format_for_cpu", False):
        return (
            f"{name} was repacked, and rounded again, by a forward in evaluation mode, as "
            "bitsandbytes does on a CPU: load the model anew, and measure or tune it first"
        )
    for attribute in _OF_THE_INPUT:
        if getattr(parameter, attribute, None) is not None:
            return (
                f"{name} is a {kind} with {attribute}, which quantizes or rescales what comes in "
                "as well: quantize weights only, as Int8WeightOnlyConfig or Int4WeightOnlyConfig do"
            )
    if "forward" in vars(module) and matrix_of(module) is not None:
        return (
            f"{name} is quantized, and its {type(module).__name__} has a forward of its own put on "
            "it, as hooks of accelerate are: take it off first (remove_hook_from_submodules)"
        )
    return None

"""What a model must be before it is measured or tuned: itself, with weights that can be trained."""

from __future__ import annotations

import torch
from torch import nn

from ..distributed.sharded import is_sharded

_QUANTIZERS = ("torchao", "bitsandbytes")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)


def check_trainable_itself(model: nn.Module, verb: str, *, may_be_offloaded: bool = False) -> None:
    """Raise unless `model` is the very module whose names and parameters training will meet.

    Args:
        model: any module.
        verb: what is about to be done to it, for messages: `"measure"`.
        may_be_offloaded: whether weights may be on the host at times.

    Raises:
        ValueError: it is compiled, scripted, offloaded or wrapped for data parallelism; or a
            parameter has no values, is quantized or sharded, or was made in inference mode.
    """
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"model is wrapped in a {type(model).__name__}: {verb} the model itself, before it is "
            "compiled or wrapped"
        )
    if not may_be_offloaded:
        check_not_offloaded(model, verb)
    for name, parameter in model.named_parameters():
        if type(parameter).__module__.partition(".")[0] in _QUANTIZERS:
            raise ValueError(
                f"{name} is quantized ({type(parameter).__name__}), and what is trained would be "
                "lost in rounding: measure, tune and merge the model in floating point, and "
                "quantize what merge leaves behind"
            )
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

"""`approximate`: a model's backward made to keep less, in place, until it is called again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..layers.norm import is_layer_norm
from ..model.check import check_not_wrapped
from .activation import ApproximateActivation, function_of
from .choice import GELU_BITS, Approximation, check_choice
from .layer_norm import ApproximateLayerNorm
from .stand_in import StandIn, may_stand_in, remove


def approximate(
    model: nn.Module, *, gelu: str | None = None, layer_norm: str | None = None
) -> nn.Module:
    """Make a model's backward keep less at the price of approximate gradients, in place.

    The forward stays exact, to the bit on a CPU, and so do the weights; without gradients nothing
    is different at all. Call it before or after `apply`, with any method. Each call replaces what
    an earlier one did, and `approximate(model)` makes the backward exact again, as `merge` does.
    `model.spt_approximation` tells what is approximate; a task file's metadata tell it, too.

    * `gelu`: activations (GELU in both forms, SiLU, QuickGELU, of torch, timm and transformers)
      keep their derivative in 2 or 8 bits an element instead of their input of 16 or 32. Of 8 bits
      it is off by 0.0025 at most; the four levels of 2 bits are those of the least expected squared
      error for a standard normal input. Where the layer behind needs the activation's output for
      what is trained in it, and would rebuild that from what an exact activation keeps, an
      activation stays exact as long as that takes less.
    * `layer_norm`: LayerNorms of an fp32 input (also under autocast, where the residual stream is
      fp32) keep their normalized output in fp16. Those of 16 bits would save nothing and stay
      exact.

    Yang et al., "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing
    Backpropagation" (ICML 2024), have both ideas; levels and formats are other ones here.

    Args:
        model: plain or tuned; not compiled or wrapped yet.
        gelu: `"2bit"`, `"8bit"`, or None for exact ones.
        layer_norm: `"from-output"`, or None for exact ones.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no such choice, or nothing in the model that it is for; the model is
            compiled or wrapped. The model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_choice(gelu, layer_norm)
    check_not_wrapped(model, "approximate")
    activations = {} if gelu is None else dict(_activations(model, GELU_BITS[gelu]))
    norms = {} if layer_norm is None else dict(_norms(model))
    kind = type(model).__name__
    if gelu is not None and not activations:
        raise ValueError(
            f"gelu={gelu!r}: {kind} has no GELU, SiLU or QuickGELU module of torch, timm or "
            "transformers"
        )
    if layer_norm is not None and not norms:
        raise ValueError(f"layer_norm={layer_norm!r}: {kind} has no LayerNorm module")
    for module in model.modules():
        remove(module)
    for stand_in in (*activations.values(), *norms.values()):
        stand_in.put()
    if activations or norms:
        label = Approximation(gelu, layer_norm, tuple(activations), tuple(norms))
        model.spt_approximation = label  # type: ignore[assignment]
    elif hasattr(model, "spt_approximation"):
        del model.spt_approximation
    return model


def _activations(model: nn.Module, bits: int) -> Iterator[tuple[str, StandIn]]:
    """Name and stand-in of each activation; the layer behind one is the next in order of names."""
    modules = list(model.named_modules())
    for place, (name, module) in enumerate(modules):
        function = function_of(module) if may_stand_in(module) else None
        if function is not None:
            after = (m for _, m in modules[place + 1 :] if isinstance(m, (nn.Linear, nn.Conv2d)))
            yield name, ApproximateActivation(module, function, bits, next(after, None))


def _norms(model: nn.Module) -> Iterator[tuple[str, StandIn]]:
    for name, module in model.named_modules():
        if may_stand_in(module) and is_layer_norm(module):
            yield name, ApproximateLayerNorm(module)

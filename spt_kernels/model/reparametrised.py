"""Layers whose weight is computed from other parameters: weight norm, spectral norm, pruning."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_TUNABLE = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.modules.batchnorm._NormBase)


def check_own_weights(model: nn.Module, wanted: Collection[str], left_out: Collection[str]) -> None:
    """Raise when a layer that is to be tuned computes its weight from other parameters.

    An entry of such a weight is no parameter: it has no place to train a delta at, and what is
    trained in its stead (a direction and a length, the values under a mask) is not what the scores
    and the budget are about. So these layers are refused rather than passed by silently. They may
    be made plain, which changes no output, or left out; as a head they train whole as they are.

    Args:
        model: any module.
        wanted: names of the parameters to tune.
        left_out: names of those that belong to head or stem, or were excluded.

    Raises:
        ValueError: there is such a layer that is a Linear, a Conv2d or a norm and not left out, or
            some of whose parameters are wanted.
    """
    for name, module in model.named_modules():
        for local, how, remedy in _made(module):
            prefix = f"{name}." if name else ""
            own = {n for n, _ in module.named_parameters(prefix=name)}
            is_wanted = not own.isdisjoint(wanted)
            if is_wanted or (isinstance(module, _TUNABLE) and own.difference(left_out)):
                raise ValueError(
                    f"{prefix}{local} is computed by {how} from other parameters and cannot be "
                    f"measured or tuned: make it a plain parameter first ({remedy}), or leave the "
                    f"layer out with exclude=[{prefix + '*'!r}]"
                )


def _made(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Of each parameter that is computed: its local name, by what, and how to make it plain."""
    if parametrize.is_parametrized(module):
        for local, made_by in module.parametrizations.items():  # type: ignore[union-attr, operator]
            how = " and ".join(type(part).__name__.lstrip("_") for part in made_by)
            yield (
                local,
                how,
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {local!r})",
            )
        return
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield (
                hook.name,
                "weight_norm",
                f"torch.nn.utils.remove_weight_norm(layer, {hook.name!r})",
            )
        elif isinstance(hook, SpectralNorm):
            remedy = f"torch.nn.utils.remove_spectral_norm(layer, {hook.name!r})"
            yield hook.name, "spectral_norm", remedy
        elif isinstance(hook, prune.BasePruningMethod):
            local = hook._tensor_name
            yield local, "pruning", f"torch.nn.utils.prune.remove(layer, {local!r})"

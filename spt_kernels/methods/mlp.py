"""A perceptron of K layers for a head (MLP-K of VPT, Jia et al., 2022).

K - 1 layers as wide as the features, each with a ReLU, come before the linear layer that was there.
VPT's code also has a BatchNorm and a dropout of 0.1 after each; its paper has neither, and without
them a batch may be of one image and a score does not hang on what else is in the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..layers.structured import NEW
from ..model import head_names
from ..tuning import replace_module
from .method import Method
from .tunable import Tunable, counted, freeze_backbone


def tune(model: nn.Module, method: Method, plan: Any) -> Tunable:
    """Put an `MlpHead` in the place of each linear layer of the head; nothing else is trained.

    The hidden layers count as trained, the layer that scores does not, as no head's does.

    Raises:
        ValueError: K is 1, or the head is not linear, or there is none.
    """
    if method.size < 2:
        raise ValueError(f"method: {method.name!r} is 'linear'; expected mlp-2 or more")
    names = head_names(model, method.head)
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    if not layers:
        raise ValueError(f"head: {method.name!r} needs one, {type(model).__name__} has none")
    heads = {name: model.get_submodule(name) for name in layers}
    for name, layer in heads.items():
        if not isinstance(layer, nn.Linear) or not name:
            raise ValueError(
                f"head: {method.name!r} puts layers before a linear one, {name or 'the model'} is "
                f"a {type(layer).__name__}"
            )
    in_head = sum(model.get_parameter(name).numel() for name in names)
    freeze_backbone(model, method.head)
    for name, layer in heads.items():
        assert isinstance(layer, nn.Linear)
        replace_module(model, name, MlpHead(layer, method.size - 1))
    return counted(model, in_head=in_head)


class MlpHead(nn.Module):
    """Hidden layers and ReLUs before a linear layer.

    Args:
        last: gives the scores; stays the object that it is.
        hidden: how many layers come before it, each as wide as its input. They are drawn as
            `nn.Linear` would be with He's initialisation, on the CPU, the same on every device.
    """

    def __init__(self, last: nn.Linear, hidden: int) -> None:
        super().__init__()
        width = last.in_features
        layers: list[nn.Module] = []
        for _ in range(hidden):
            layer = nn.Linear(width, width, **NEW)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        # of the scoring layer's dtype, whose input they make
        self.hidden = nn.Sequential(*layers).to(last.weight.device, last.weight.dtype)
        self.last = last

    def forward(self, features: Tensor) -> Tensor:
        """`[..., width]` to `[..., classes]`."""
        scores: Tensor = self.last(self.hidden(features))
        return scores

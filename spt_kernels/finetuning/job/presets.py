"""Recipes as they were published: training, preprocessing and the options of a method together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ...methods.method import Method, check_one_of, entry_of
from .recipe import Recipe

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_224_OF_256 = 0.875


@dataclass(frozen=True)
class Preset:
    """A published recipe, from which a `FinetuneJob` is made.

    Attributes:
        recipe: how a model is trained; its `preset` is the name.
        form: fields of `Preprocessing` that are not to be the model's own.
        options: fields of `Method`, of those methods that read them.
    """

    recipe: Recipe
    form: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def method(self, name: str = Method.name, **given: Any) -> Method:
        """The method called `name` with these options, as far as it reads them; `given` go first.

        Raises:
            ValueError: there is no such method, or an option is none of its own.
        """
        read = entry_of(name).options
        own = {option: value for option, value in self.options.items() if option in read}
        return Method(name, **{**own, **given})


_PAPER = Recipe(
    epochs=100,
    batch_size=64,
    lr=None,  # 1e-3, and less for `full`, which the paper takes from others
    weight_decay=1e-4,
    warmup_epochs=None,  # a tenth: 10 of 100
    drop_path=None,  # 0.1 where the model has it
    schedule="step",
)
_PAPERS_OPTIONS = {"samples": 800, "rule": "paper", "scale": 1.0, "dropout": 0.1}
_CODE = replace(_PAPER, min_lr_share=0.01, schedule="epoch")
_CODES_OPTIONS = {"samples": 512, "rule": "published-code", "scale": 1.0, "dropout": 0.1}

# The paper is He et al., ICCV 2023, section 4.1; the code is https://github.com/ziplab/SPT. Each is
# as on VTAB-1k, and with `-fgvc` as on FGVC, where images are prepared in another way.
PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        name: replace(preset, recipe=replace(preset.recipe, preset=name))
        for name, preset in {
            "paper": Preset(_PAPER, {"fit": "squash", "augment": "none"}, _PAPERS_OPTIONS),
            "paper-fgvc": Preset(
                _PAPER,
                {"fit": "crop", "crop_pct": _224_OF_256, "augment": "resized-crop-flip"},
                _PAPERS_OPTIONS,
            ),
            "published-code": Preset(
                _CODE,
                {"fit": "squash", "augment": "none", "interpolation": "bicubic", **_IMAGENET},
                _CODES_OPTIONS,
            ),
            "published-code-fgvc": Preset(
                _CODE,
                {
                    "fit": "squash",
                    "crop_pct": _224_OF_256,
                    "augment": "random-crop-flip",
                    "interpolation": "bicubic",
                    **_IMAGENET,
                },
                _CODES_OPTIONS,
            ),
        }.items()
    }
)


def preset_of(name: str) -> Preset:
    """The preset called `name`, one of `PRESETS`.

    Raises:
        ValueError: there is none.
    """
    check_one_of("recipe", name, PRESETS)
    return PRESETS[name]

"""The base model: any timm architecture, with weights from a file or from timm."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ...errors import needed
from ...methods.method import did_you_mean
from ...model import head_names, start_small
from ..images.pixels import Preprocessing
from .model_arguments import FAILURES, cannot_be_built, check_arguments
from .pretrained import load_pretrained
from .timm_filter import translation_of
from .weights import LoadedWeights, load_weights

with needed("building models by name"):
    import timm


@dataclass(frozen=True)
class ModelSource:
    """What to build.

    Attributes:
        name: a timm architecture.
        args: its constructor's arguments beside the number of classes.
        weights: a file with a state dict, `.safetensors` or what `torch.save` wrote, or AugReg's
            `.npz`; see docs/INPUTS.md for what is understood.
        pretrained: let timm download the weights of `name`.
        new_head: start the head afresh even where the weights' own is of as many classes.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False
    new_head: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights, pretrained: expected one of them, got both")


@dataclass(frozen=True)
class BaseModel:
    """A model as it is before tuning, and what became of its parts on the way.

    Attributes:
        model: in evaluation mode, on the CPU.
        head_is_new: whether the head was initialised afresh, because the classes differ.
        drop_path: the stochastic depth it was built with.
        weight_notes: what of the file of weights was taken, changed, and left out.
    """

    model: nn.Module
    head_is_new: bool
    drop_path: float
    weight_notes: tuple[str, ...] = ()


def build(
    source: ModelSource, num_classes: int, *, seed: int = 0, drop_path: float | None = 0.0
) -> BaseModel:
    """Build the model of `source` with a head for `num_classes`.

    A head in the weights that has another number of classes is left out; the new one starts as the
    architecture draws it, or smaller, see `start_small`. `drop_path=None` is 0.1 where the
    architecture has stochastic depth, and none elsewhere; 0 is none, unless the arguments of the
    model say otherwise.

    Raises:
        ValueError: an unknown architecture or argument, or weights that do not fit it.
    """
    check_arguments(source.args, num_classes)
    torch.manual_seed(seed)  # of the head's initial values
    model, rate = _create(source, num_classes, drop_path)
    start_small(model)  # weights that have a head for these classes come over it
    fresh = {name: model.state_dict()[name].clone() for name in head_names(model)}

    def create(more: Mapping[str, Any]) -> nn.Module:
        # not `_create`, which says of any failure that the arguments are to blame
        own = {"num_classes": num_classes, "drop_path_rate": 0.0, **source.args, **more}
        if not rate:  # an architecture without stochastic depth has no such argument
            del own["drop_path_rate"]
        return timm.create_model(source.name, **own)

    def create_empty(more: Mapping[str, Any]) -> nn.Module:
        return _create_empty(replace(source, args={**source.args, **more}), num_classes)

    loaded = LoadedWeights(head_is_new=True)
    if source.weights is not None:
        loaded = load_weights(model, source.weights, lambda: translation_of(create_empty))
    elif source.pretrained:
        loaded = LoadedWeights(load_pretrained(model, source.name, create))
    if source.new_head:
        model.load_state_dict(fresh, strict=False)
    return BaseModel(model.eval(), loaded.head_is_new or source.new_head, rate, loaded.notes)


def build_empty(
    source: ModelSource, num_classes: int, image_size: int | None = None
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Build the model of `source` without values, in no time, and say which images it takes.

    Weights are neither read nor downloaded. An architecture that is built for one size of images is
    built for `image_size`; any other takes images of that size as it is.

    Returns:
        The model, on the meta device where the architecture can be built there, and the shape of an
        image: channels, height, width.

    Raises:
        ValueError: an unknown architecture or argument, or a size that it cannot be built for.
    """
    _, model = _sized(source, num_classes, image_size)
    return model, preprocessing_of(model, size=image_size).image_shape


def sized_for(source: ModelSource, num_classes: int, image_size: int | None) -> ModelSource:
    """`source`, told the size of the images where its architecture is built for one size.

    Raises:
        ValueError: an unknown architecture or argument, or a size that it cannot be built for.
    """
    return source if image_size is None else _sized(source, num_classes, image_size)[0]


def preprocessing_of(model: nn.Module, **overrides: Any) -> Preprocessing:
    """The preprocessing that `model` was trained with; an override that is `None` changes nothing.

    A model of one channel takes grey images, normalised by the average over colours.

    Raises:
        ValueError: the model takes images of another size, or of other channels, than asked for.
    """
    config = timm.data.resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels not in (1, 3):
        raise ValueError(f"in_chans: images have 1 channel or 3, this model takes {channels}")
    values: dict[str, Any] = {
        "size": config["input_size"][-1],
        "mean": _per_channel(config["mean"], channels),
        "std": _per_channel(config["std"], channels),
        "interpolation": config["interpolation"],
    }
    own_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own_size is not None:
        values["size"] = own_size[0]
    values.update({name: value for name, value in overrides.items() if value is not None})
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", False)
    if own_size is not None and strict and values["size"] != own_size[0]:
        raise ValueError(
            f"image_size: this model takes {own_size[0]}, got {values['size']}; "
            f"build it for another size with the model argument img_size={values['size']}"
        )
    form = Preprocessing(**values)
    if len(form.mean) != channels:
        raise ValueError(
            f"mean, std: this model takes images of {channels} channels, "
            f"got {len(form.mean)} values"
        )
    return form


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _create(
    source: ModelSource, num_classes: int, drop_path: float | None
) -> tuple[nn.Module, float]:
    if not timm.is_model(source.name):
        hint = did_you_mean(source.name, timm.list_models()) or "; timm.list_models() lists them"
        raise ValueError(f"model: timm has no {source.name!r}{hint}")
    args = {"num_classes": num_classes, **source.args}
    given = args.pop("drop_path_rate", 0.1 if drop_path is None else 0.0)
    rate = drop_path or given
    try:
        try:  # also of 0, as some architectures have more by themselves
            return timm.create_model(source.name, **args, drop_path_rate=rate), rate
        except TypeError as error:
            is_asked = drop_path or "drop_path_rate" in source.args
            if is_asked or "drop_path_rate" not in str(error):
                raise
        return timm.create_model(source.name, **args), 0.0
    except FAILURES as error:
        if isinstance(error, RuntimeError) and torch.get_default_device().type == "meta":
            raise  # it may look at values that it makes, which is no fault
        if not source.args and not isinstance(error, (TypeError, AssertionError)):
            raise

        def builds(others: Mapping[str, Any]) -> bool:
            try:
                with torch.device("meta"):
                    timm.create_model(source.name, **{"num_classes": num_classes, **others})
            except FAILURES:
                return False
            return True

        raise cannot_be_built(source.name, source.args, error, builds) from error


def _sized(
    source: ModelSource, num_classes: int, image_size: int | None
) -> tuple[ModelSource, nn.Module]:
    check_arguments(source.args, num_classes)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if image_size is not None and "img_size" not in source.args:
        sized = replace(source, args={**source.args, "img_size": image_size})
        with contextlib.suppress(ValueError):  # a ConvNet has no such argument
            return sized, _create_empty(sized, num_classes)
    return source, _create_empty(source, num_classes)


def _create_empty(source: ModelSource, num_classes: int) -> nn.Module:
    try:
        with torch.device("meta"):
            model = _create(source, num_classes, 0.0)[0]
    except RuntimeError:  # it looks at values that it makes
        return _create(source, num_classes, 0.0)[0].eval()
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    attributes = (value for module in model.modules() for value in vars(module).values())
    leaves = (leaf for value in attributes for leaf in tree_iter(value))
    if any(isinstance(t, Tensor) and t.is_meta and id(t) not in own for t in leaves):
        return _create(source, num_classes, 0.0)[0].eval()  # a forward may read these
    return model.eval()

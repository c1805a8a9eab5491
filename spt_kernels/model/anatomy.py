"""Which parameters of a model are its stem, its backbone, and the candidates for tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from .head import HeadPatterns, config_entry, head_names, is_timm
from .parameter_info import blocks_among, describe
from .quantized import logical_numel
from .reparametrised import check_own_weights
from .tied import sharing_names

_TUNABLE_KINDS = frozenset({"linear", "pointwise", "functional", "conv2d", "norm", "bias"})
_STEM_ATTRIBUTES = frozenset(
    {"patch_embed", "patch_embeds", "patch_embeddings", "embeddings", "stem", "conv_stem"}
    | {"conv_proj", "pixel_embed"}
)
# biases that attention keeps outside its fused Linear (BEiT, Swin V2, EVA)
_BARE_BIASES = (".q_bias", ".k_bias", ".v_bias")
# torchvision keeps its stem as the first member of a long `features`
_STEM_PREFIXES = ("features.0", "features.conv0", "features.norm0")
_FIRST_CONVOLUTIONS = frozenset({"conv1", "conv_stem"})  # their norm is a sibling named `bn1`


def backbone_numel(model: nn.Module, head: HeadPatterns | None = None) -> int:
    """Count the parameters of a model outside its head, which is as `head_names` has it."""
    names = set(head_names(model, head))
    return sum(logical_numel(p) for name, p in model.named_parameters() if name not in names)


def head_numel(model: nn.Module, head: HeadPatterns | None = None) -> int:
    """Count the parameters of a model's head, which is as `head_names` has it."""
    return sum(logical_numel(model.get_parameter(name)) for name in head_names(model, head))


def innermost_blocks(model: nn.Module) -> tuple[str, ...]:
    """Name the blocks of a model, in order; a stage around others is none."""
    return blocks_among(describe(model))


def stem_names(model: nn.Module) -> tuple[str, ...]:
    """Name the parameters of the stem (patch embedding), in order; empty when unknown."""
    modules = dict(model.named_modules())
    prefixes = set(_STEM_PREFIXES)
    for name, module in modules.items():
        parts = name.split(".")
        if len(parts) <= 2 and parts[-1] in _STEM_ATTRIBUTES:
            prefixes.add(name)
        if is_timm(module):
            for first in config_entry(module, "first_conv"):
                prefixes.add(_widen(modules, f"{name}.{first}" if name else first))
    if "conv1" in modules and "bn1" in modules:
        prefixes.add("conv1")
    for prefix in list(prefixes):
        parent, _, last = prefix.rpartition(".")
        if last in _FIRST_CONVOLUTIONS:
            prefixes.add(f"{parent}.bn1" if parent else "bn1")
    prefixes.discard("")
    return tuple(
        name
        for name, _ in model.named_parameters()
        if any(name.startswith(f"{prefix}.") for prefix in prefixes)
    )


def candidate_names(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    head: HeadPatterns | None = None,
) -> list[str]:
    """Name the parameters that may be tuned, in the model's order.

    By default these are weights and biases of every Linear, Conv2d and norm that is neither in the
    head nor in the stem, and the q, k and v biases that some models keep outside their Linear.
    Parameters that go by several names, or lie in the memory of others, cannot be tuned and are
    left out.

    Args:
        model: any module.
        include: shell-style patterns over full parameter names, added to the default.
        exclude: patterns taken away from the result; they win over `include`.
        head: as `head_names` has it.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left, or a layer computes its
            weight from other parameters (`check_own_weights`).
    """
    chosen = possible_names(model, include, exclude, head=head)
    excluded = _matching(describe(model), exclude, "exclude")
    left_out = {*head_names(model, head), *stem_names(model), *excluded}
    check_own_weights(model, chosen, left_out)
    return chosen


def possible_names(
    model: nn.Module,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    head: HeadPatterns | None = None,
) -> list[str]:
    """As `candidate_names`, where it is not decided yet what the head is: layers are not looked at.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left.
    """
    info = describe(model)
    chosen = {
        name
        for name, what in info.items()
        if what.kind in _TUNABLE_KINDS or name.endswith(_BARE_BIASES)
    }
    shared = sharing_names(model.named_parameters(remove_duplicate=False))
    chosen -= {*head_names(model, head), *stem_names(model), *shared}
    chosen |= _matching(info, include, "include")
    chosen -= _matching(info, exclude, "exclude")
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no candidate parameters: expected Linear, Conv2d or norm "
            "modules outside head and stem, or names added by include"
        )
    return [name for name in info if name in chosen]


def _matching(names: Iterable[str], patterns: Iterable[str], argument: str) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument} must be a sequence of patterns, got the string {patterns!r}")
    names = list(names)
    result: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"{argument}: pattern {pattern!r} matches no parameter of the model")
        result.update(found)
    return result


def _widen(modules: Mapping[str, nn.Module], name: str) -> str:
    # The stem is all of the top-level module around the first convolution, unless that module is
    # most of the model (VGG keeps everything in `features`).
    parts = name.split(".")
    total = _n_matrices(modules[""])
    for stop in range(1, len(parts)):
        prefix = ".".join(parts[:stop])
        if prefix in modules and 2 * _n_matrices(modules[prefix]) < total:
            return prefix
    return name


def _n_matrices(module: nn.Module) -> int:
    return sum(parameter.ndim >= 2 for parameter in module.parameters())

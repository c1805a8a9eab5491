"""SETR-PUP: a vision transformer that gives a class to every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_OF_TWENTY_FOUR = (10, 15, 20)  # the blocks of a ViT-L that auxiliary heads read
_STD = 0.01  # of the classifier's initial weights


def auxiliary_blocks(depth: int) -> tuple[int, ...]:
    """After which blocks of `depth`, counted from 1, auxiliary heads read: 10, 15, 20 of 24."""
    scaled = {int(block * depth / 24 + 0.5) for block in _OF_TWENTY_FOUR}
    return tuple(sorted(block for block in scaled if 0 < block < depth))


class Setr(nn.Module):
    """SETR-PUP (Zheng et al., CVPR 2021): ViT features, upsampled step by step.

    `decode_head` reads the last block; in training mode `auxiliary_heads` read earlier ones. These,
    named by `trained_whole`, are the head: `measure_sensitivity(model, …,
    head=model.trained_whole)`.

    As in the configuration that the tables of VPT and SPT are of, convolutions have 256 channels,
    and there are three auxiliary heads: 13.1M parameters on a ViT-L for 150 classes.

    Args:
        backbone: a plain vision transformer of timm, built with `dynamic_img_size=True`. It loses
            its classifier and its last norm, in place: each head has a norm of its own.
        num_classes: of a pixel.
        channels: of the convolutions.
        auxiliary: after which blocks, counted from 1, auxiliary heads read; `None` is
            `auxiliary_blocks`.

    Raises:
        ValueError: the backbone is of another kind, or there is no such block.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        channels: int = 256,
        auxiliary: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.patch = _patch_size(backbone)
        depth, width = len(_blocks(backbone)), _width(backbone)
        chosen = auxiliary_blocks(depth) if auxiliary is None else tuple(sorted(set(auxiliary)))
        if any(not 0 < block <= depth for block in chosen):
            raise ValueError(f"auxiliary: expected blocks of 1 to {depth}, got {list(chosen)}")
        self.num_classes, self.auxiliary = num_classes, chosen
        self._indices = sorted({*(block - 1 for block in chosen), depth - 1})
        pruned: Any = backbone
        pruned.prune_intermediate_layers([depth - 1], prune_norm=True, prune_head=True)
        self.backbone = backbone
        self.decode_head = _UpHead(width, channels, num_classes, steps=4, factor=2)
        self.auxiliary_heads = nn.ModuleList(
            _UpHead(width, channels, num_classes, steps=2, factor=4) for _ in chosen
        )

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Names of the modules that are the head."""
        return ("decode_head", *(("auxiliary_heads",) if self.auxiliary else ()))

    # What deep prompts (VPT) ask a plain ViT for
    @property
    def blocks(self) -> nn.Module:
        """The backbone's blocks."""
        return self.backbone.blocks  # type: ignore[return-value]

    @property
    def embed_dim(self) -> int:
        """The width of a token."""
        return _width(self.backbone)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the patches."""
        return int(self.backbone.num_prefix_tokens)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Scores of every pixel.

        Args:
            images: `[B, 3, height, width]` of any size; what is missing to whole patches, right and
                below, counts as zero.

        Returns:
            `[B, classes, height, width]`; in training mode a tuple of these, first the decoder's,
            then those of the auxiliary heads.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.patch[1], 0, -height % self.patch[0]))
        vit: Any = self.backbone
        size = padded.shape[-2:]
        rows, columns = vit.patch_embed.dynamic_feat_size(size)
        every: list[Tensor] = vit.forward_intermediates(
            padded, indices=self._indices, norm=False, output_fmt="NLC", intermediates_only=True
        )
        # the patches' tokens come last: learned prompts that stay (VPT) are before them
        features = [
            tokens[:, -rows * columns :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
            for tokens in every
        ]
        scores = self.decode_head(features[-1], size)[..., :height, :width]
        if not self.training:
            return scores
        by_block = dict(zip(self._indices, features, strict=True))
        others = (
            head(by_block[block - 1], size)[..., :height, :width]
            for head, block in zip(self.auxiliary_heads, self.auxiliary, strict=True)
        )
        return (scores, *others)


class _UpHead(nn.Module):
    """Convolutions, each followed by an upsampling, until features are as large as the image."""

    def __init__(
        self, width: int, channels: int, num_classes: int, *, steps: int, factor: int
    ) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels if i else width, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for i in range(steps)
        )
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=_STD)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, size: torch.Size) -> Tensor:
        """`[B, width, rows, columns]` to `[B, classes, *size]`."""
        x = self.norm(features.movedim(1, -1)).movedim(-1, 1).contiguous()
        for i, step in enumerate(self.steps):
            x = step(x)
            if i + 1 < len(self.steps):  # patches of fewer than 16 pixels need no more than them
                larger = zip(x.shape[2:], size, strict=True)
                x = _resized(x, [min(self.factor * n, most) for n, most in larger])
        # A product with a matrix commutes with the interpolation of pixels: the last upsampling,
        # which the paper has before the classifier, is of classes in place of so many channels
        return _resized(self.classify(x), list(size))


def _resized(x: Tensor, size: list[int]) -> Tensor:
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _blocks(backbone: nn.Module) -> Sequence[nn.Module]:
    blocks = getattr(backbone, "blocks", None)
    is_plain = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and all(
        callable(getattr(backbone, name, None))
        for name in ("forward_intermediates", "prune_intermediate_layers")
    )
    if not is_plain or not getattr(backbone, "dynamic_img_size", False):
        raise ValueError(
            f"model: expected a plain vision transformer of timm, as vit_base_patch16_224, built "
            f"with dynamic_img_size=True, got {type(backbone).__name__}"
        )
    return list(blocks)  # type: ignore[arg-type]


def _patch_size(backbone: nn.Module) -> tuple[int, int]:
    _blocks(backbone)
    rows, columns = backbone.patch_embed.patch_size  # type: ignore[union-attr, misc]
    return int(rows), int(columns)


def _width(backbone: nn.Module) -> int:
    return int(backbone.embed_dim)  # type: ignore[arg-type]

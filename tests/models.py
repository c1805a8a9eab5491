"""Small real models and data that the tests share."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import SEModule
from timm.models import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn


def tiny_vit(seed: int = 0, *, num_classes: int = 5, depth: int = 2, width: int = 24) -> nn.Module:
    """A timm ViT of 16×16 images, 16 patches, three heads; no parameter left at a constant."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=3,
        num_classes=num_classes,
    )
    return _spread(model)


def tiny_swin(
    seed: int = 0, *, num_classes: int = 5, depths: tuple[int, int] = (2, 2)
) -> nn.Module:
    """A timm Swin of 32×32 images with two stages and shifted windows."""
    torch.manual_seed(seed)
    model = SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=depths,
        num_heads=(2, 4),
        num_classes=num_classes,
    )
    return _spread(model)


def tiny_convnext(seed: int = 0, *, num_classes: int = 5) -> nn.Module:
    """A timm ConvNeXt of 32×32 images with four stages: depthwise convolutions, layer scale."""
    torch.manual_seed(seed)
    model = ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=num_classes, ls_init_value=0.5
    )
    return _spread(model)


def tiny_resnet(seed: int = 0, *, num_classes: int = 5) -> nn.Module:
    """A timm ResNet of 32×32 images: bottlenecks, strided shortcuts, squeeze-and-excitation."""
    torch.manual_seed(seed)
    model = ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        channels=(4, 4, 8, 8),
        num_classes=num_classes,
        block_args={"attn_layer": partial(SEModule, rd_channels=1)},
    )
    return _spread(model)


def tiny_batch(
    n: int = 4, *, size: int = 16, num_classes: int = 5, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """`n` random images `[n, 3, size, size]` and labels `[n]`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images, torch.randint(num_classes, (n,), generator=generator)


def _spread(model: nn.Module) -> nn.Module:
    # timm initialises biases, norms and heads to constants, which hides mistakes in their gradients
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()

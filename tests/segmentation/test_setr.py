"""SETR-PUP: its shapes, its size, what it is made of and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from spt_kernels.finetuning.base.models import ModelSource
from spt_kernels.segmentation import IGNORED, PixelLoss, Setr, build_setr
from spt_kernels.segmentation.setr import auxiliary_blocks

from .scenes_on_disk import TINY


def tiny(depth: int = 3, seed: int = 0) -> Setr:
    source = ModelSource("vit_tiny_patch16_224", {**TINY, "depth": depth})
    return build_setr(source, 4, 32, channels=6, seed=seed).model


def test_every_pixel_of_any_size_gets_scores() -> None:
    model = tiny()
    with torch.no_grad():
        for height, width in ((32, 32), (40, 48), (21, 35), (5, 9)):
            images = torch.randn(2, 3, height, width)
            assert model(images).shape == (2, 4, height, width)
            assert [s.shape for s in model.train()(images)] == [(2, 4, height, width)] * 3
            model.eval()


def test_it_is_as_large_as_the_one_of_the_papers_tables() -> None:
    with torch.device("meta"):
        vit = timm.create_model(
            "vit_large_patch16_224", num_classes=0, img_size=512, dynamic_img_size=True
        )
        model = Setr(vit, 150)
    conv = 9 * 1024 * 256 + 512  # the first, with its norm
    next_conv, ends = 9 * 256 * 256 + 512, 2 * 1024 + 256 * 150 + 150
    decoder, auxiliary = conv + 3 * next_conv + ends, conv + next_conv + ends
    head = [p.numel() for n, p in model.named_parameters() if n.startswith(model.trained_whole)]
    assert sum(head) == decoder + 3 * auxiliary == 13_143_640
    assert model.auxiliary == (10, 15, 20)


def test_auxiliary_heads_are_where_those_of_24_blocks_are() -> None:
    assert [auxiliary_blocks(depth) for depth in (24, 12, 2, 1)] == [
        (10, 15, 20),
        (5, 8, 10),  # as SETR has them on DeiT-B
        (1,),
        (),
    ]
    assert tiny(depth=1).trained_whole == ("decode_head",)


def test_heads_read_the_blocks_that_they_are_of() -> None:
    model = tiny().train()
    seen: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        block.register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out))
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 32, 32))
        assert model.auxiliary == (1, 2)
        for head, block, scores in zip(
            (model.decode_head, *model.auxiliary_heads), (2, 0, 1), outputs, strict=True
        ):
            features = seen[block][:, 1:].reshape(2, 4, 4, 32).permute(0, 3, 1, 2)
            torch.testing.assert_close(head(features, torch.Size((32, 32))), scores)


def test_the_classifier_comes_last_as_in_the_paper() -> None:
    """What is computed before the last upsampling is what would be computed after it."""
    head = tiny().decode_head
    nn.init.normal_(head.classify.weight)
    features, size = torch.randn(2, 32, 2, 2), torch.Size((32, 32))
    x = head.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for step in head.steps:
        x = F.interpolate(step(x), scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(head(features, size), head.classify(x), atol=1e-5, rtol=1e-4)


def test_decoders_of_a_seed_are_alike() -> None:
    first, again, other = tiny(), tiny(), tiny(seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.decode_head.classify.weight, other.decode_head.classify.weight)


def test_the_backbone_has_the_values_of_its_file(backbone: ModelSource) -> None:
    """But for the classifier, the last norm, and embeddings of other positions."""
    own = build_setr(backbone, 4, 32, channels=6)
    state = own.model.backbone.state_dict()
    for name, tensor in load_file(str(backbone.weights)).items():
        if name == "pos_embed":
            assert state[name].shape == (1, 17, 32)
            assert torch.equal(state[name][:, 0], tensor[:, 0])
        elif not name.startswith(("head.", "norm.")):
            assert torch.equal(state.pop(name), tensor), name
    assert list(state) == ["pos_embed"], "nothing else"
    assert "pos_embed adapted" in "; ".join(own.weight_notes)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8}),
    ],
)
def test_what_is_no_plain_vit_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^model: expected a plain vision transformer"):
        build_setr(ModelSource(name, arguments), 4, 32)


def test_blocks_that_are_not_there_are_refused() -> None:
    source = ModelSource("vit_tiny_patch16_224", TINY)
    with pytest.raises(ValueError, match=r"^auxiliary: expected blocks of 1 to 2, got \[3\]"):
        build_setr(source, 4, 32, auxiliary=[3])


def test_the_loss_is_a_mean_over_the_labelled_pixels() -> None:
    scores = [torch.randn(2, 4, 3, 5, requires_grad=True) for _ in range(3)]
    labels = torch.randint(4, (2, 3, 5))
    labels[0] = IGNORED
    by_pixel = [s.log_softmax(1)[1].permute(1, 2, 0).reshape(15, 4) for s in scores]
    own = labels[1].flatten()
    means = [-sum(row[i, c] for i, c in enumerate(own.tolist())) / 15 for row in by_pixel]
    loss = PixelLoss(0.4)
    torch.testing.assert_close(loss(tuple(scores), labels), means[0] + 0.4 * (means[1] + means[2]))
    torch.testing.assert_close(loss(scores[0], labels), means[0])
    labels[:] = IGNORED
    nothing = loss(tuple(scores), labels)
    nothing.backward()
    assert nothing == 0
    assert not scores[0].grad.any()  # type: ignore[union-attr]

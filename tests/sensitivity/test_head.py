"""The head is what comes last before the loss, whatever it is called."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import spt_kernels as spt
from spt_kernels.sensitivity import find_head
from tests.models import tiny_batch, tiny_convnext, tiny_swin, tiny_vit
from tests.sensitivity.per_sample_truth import assert_exact

IMAGES, LABELS = tiny_batch(4)
WIDTH, CLASSES = 24, 5


def backbone() -> nn.Module:
    """A ViT whose output is its features."""
    return tiny_vit(depth=1, num_classes=0)


class Net(nn.Module):
    """Modules, and how they make an output of images."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def classifier() -> nn.Linear:
    return nn.Linear(WIDTH, CLASSES)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return output.square().mean()


def called(name: str) -> nn.Module:
    return Net(
        lambda m, x: getattr(m, name)(m.backbone(x)), backbone=backbone(), **{name: classifier()}
    )


def two_heads() -> nn.Module:
    return VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5
    )


def inner_fc() -> nn.Module:
    return Net(
        lambda m, x: m.last(m.fc(m.stem(x).flatten(1)).relu()),
        stem=nn.Conv2d(3, 8, 8, 8),
        fc=nn.Linear(32, 16),
        last=nn.Linear(16, CLASSES),
    )


def cosine() -> nn.Module:
    return Net(
        lambda m, x: m.scale * F.linear(F.normalize(m.backbone(x)), F.normalize(m.proxies)),
        backbone=backbone(),
        proxies=nn.Parameter(torch.randn(CLASSES, WIDTH)),
        scale=nn.Parameter(torch.tensor(4.0)),
    )


def frozen_features() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            x = m.backbone(x)
        return m.score(x)

    return Net(run, backbone=backbone(), score=classifier())


def one_of_two_towers() -> nn.Module:
    return Net(
        lambda m, x: (m.score(m.backbone(x)), m.other(x)),
        backbone=backbone(),
        score=classifier(),
        other=backbone(),
    )


def refined() -> nn.Module:
    """A regressor that corrects its own answer, as those of poses do."""

    def run(m: Any, x: Tensor) -> Tensor:
        features, guess = m.backbone(x), x.new_zeros(len(x), CLASSES)
        for _ in range(2):
            guess = guess + m.step(torch.cat([features, guess], 1))
        return guess

    return Net(run, backbone=backbone(), step=nn.Linear(WIDTH + CLASSES, CLASSES))


def first(loss: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda outputs, target: loss(outputs[0], target)


HEADS: dict[str, tuple[Callable[[], nn.Module], list[str], Any]] = {
    "vit": (tiny_vit, ["head."], F.cross_entropy),
    "cls_head": (lambda: called("cls_head"), ["cls_head."], F.cross_entropy),
    "score": (lambda: called("score"), ["score."], F.cross_entropy),
    "wrapped": (
        lambda: Net(lambda m, x: m.net(x), net=called("classifier")),
        ["net.classifier."],
        F.cross_entropy,
    ),
    "sequential": (lambda: nn.Sequential(backbone(), classifier()), ["1."], F.cross_entropy),
    "mlp": (
        lambda: nn.Sequential(backbone(), nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, CLASSES)),
        ["3."],
        F.cross_entropy,
    ),
    "two-heads": (two_heads, ["head.", "head_dist."], F.cross_entropy),
    "two-tasks": (
        lambda: Net(
            lambda m, x: (lambda f: (m.task_a(f), m.task_b(f)))(
                m.encoder.forward_features(x)[:, 0]
            ),
            encoder=tiny_vit(depth=1),
            task_a=classifier(),
            task_b=classifier(),
        ),
        ["task_a.", "task_b."],
        lambda outputs, target: sum(F.cross_entropy(o, target) for o in outputs),
    ),
    "inner-fc": (inner_fc, ["last."], F.cross_entropy),
    "cosine": (cosine, ["proxies", "scale"], F.cross_entropy),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, CLASSES, 1)
        ),
        ["3."],
        lambda output, target: F.cross_entropy(output.mean((2, 3)), target),
    ),
    "transposed-convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2, 2)),
        ["2."],
        squares,
    ),
    "depth": (
        # its activation belongs to the task: what is narrow is no layer of features
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.ReLU()),
        ["2."],
        squares,
    ),
    "scores-after-relu": (
        # as SqueezeNet has it
        lambda: Net(
            lambda m, x: m.classifier(m.features(x)).relu().mean((2, 3)),
            features=nn.Conv2d(3, 4, 3),
            classifier=nn.Conv2d(4, CLASSES, 1),
        ),
        ["classifier."],
        F.cross_entropy,
    ),
    "past-the-input": (
        lambda: Net(
            lambda m, x: x + m.last(m.first(x).relu()),
            first=nn.Conv2d(3, 8, 3, padding=1),
            last=nn.Conv2d(8, 3, 3, padding=1),
        ),
        ["last."],
        squares,
    ),
    "refined": (refined, ["step."], squares),
    "one-of-two-towers": (one_of_two_towers, ["score."], first(F.cross_entropy)),
    "features-too": (
        lambda: Net(
            lambda m, x: (lambda f: (m.score(f), f))(m.backbone(x)),
            backbone=backbone(),
            score=classifier(),
        ),
        ["score."],
        lambda outputs, target: F.cross_entropy(outputs[0], target) + outputs[1].square().mean(),
    ),
    "frozen-features": (frozen_features, ["score."], F.cross_entropy),
    "checkpointed": (
        lambda: Net(
            lambda m, x: m.score(checkpoint.checkpoint(m.backbone, x, use_reentrant=False)),
            backbone=backbone(),
            score=classifier(),
        ),
        ["score."],
        F.cross_entropy,
    ),
    "weight-norm": (
        lambda: Net(
            lambda m, x: m.score(m.backbone(x)),
            backbone=backbone(),
            score=nn.utils.parametrizations.weight_norm(classifier()),
        ),
        ["score."],
        F.cross_entropy,
    ),
    "features": (backbone, [], squares),
    "features-of-swin": (lambda: tiny_swin(num_classes=0), [], squares),
    "features-of-convnext": (lambda: tiny_convnext(num_classes=0), [], squares),
    "features-after-relu": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU()),
        [],
        squares,
    ),
    "residual-features": (
        lambda: Net(
            lambda m, x: (lambda z: z + m.up(F.gelu(m.down(z))))(m.embed(x.flatten(1))),
            embed=nn.Linear(768, 16),
            down=nn.Linear(16, 8),
            up=nn.Linear(8, 16),
        ),
        [],
        squares,
    ),
    "nothing-else": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), [], F.cross_entropy),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_last_layers_before_the_loss_are_the_head(case: str) -> None:
    torch.manual_seed(0)
    make, prefixes, loss_fn = HEADS[case]
    model = make().eval()
    size = 32 if "swin" in case or "convnext" in case else 16
    batch = (torch.randn(2, 3, size, size), LABELS[:2])
    names = [name for name, _ in model.named_parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = find_head(model, [batch], loss_fn)
    assert list(found) == [name for name in names if name.startswith(tuple(prefixes))]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_the_last_layers_of_words_are_found_too() -> None:
    model = Net(
        lambda m, ids: m.score(m.norm(m.mix(m.words(ids))).mean(1)),
        words=nn.Embedding(10, 8),
        mix=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        score=nn.Linear(8, CLASSES),
    )
    head = find_head(model, [(torch.randint(10, (2, 3)), LABELS[:2])])
    assert head == ("score.weight", "score.bias")


def measured(model: nn.Module, **how: Any) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, [(IMAGES, LABELS)], progress=False, **how)


def test_the_head_is_trained_whole_and_outside_of_the_budget(caplog) -> None:
    model = called("cls_head")
    with caplog.at_level(logging.INFO, "spt_kernels"):
        sensitivity = measured(model)
    assert "head: cls_head (trained whole, not in the budget)" in caplog.text
    assert sensitivity.head == ("cls_head.weight", "cls_head.bias")
    assert sensitivity.head_source == "loss"
    n_head = sum(parameter.numel() for parameter in model.cls_head.parameters())
    n_all = sum(parameter.numel() for parameter in model.parameters())
    assert sensitivity.backbone_numel == n_all - n_head
    plan = spt.allocate(sensitivity, 100)
    line = "head        cls_head (trained whole, not in the budget)"
    assert line in plan.summary().splitlines()
    spt.apply(model, plan)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(numel for n, numel in trained.items() if n.startswith("cls_head")) == n_head
    assert sum(trained.values()) == n_head + 100


def test_no_head_is_said_and_none_is_guessed() -> None:
    model = Net(
        lambda m, x: m.norm(m.fc(x.flatten(1))), fc=nn.Linear(768, 16), norm=nn.LayerNorm(16)
    )
    sensitivity = measured(model, loss_fn=squares)
    assert (sensitivity.head, sensitivity.head_source) == ((), "loss")
    plan = spt.allocate(sensitivity, 20)
    assert "head        none found" in plan.summary()
    spt.apply(model, plan)  # in which `fc` is no head for being called so
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20
    assert model.spt_tuning.plan.head == ()


@pytest.mark.parametrize("head", ["cls_head", ["cls_head.*"], ("cls_head.weight",)])
def test_a_head_that_is_given_wins(head: Any) -> None:
    model = called("cls_head")
    sensitivity = measured(model, head=head, include=["*"])
    given = ("cls_head.weight",) if head == ("cls_head.weight",) else sensitivity.head
    assert sensitivity.head == given
    assert sensitivity.head_source == "given"
    assert set(sensitivity).isdisjoint(given)
    assert len(sensitivity) + len(given) == len(list(model.parameters()))


@pytest.mark.parametrize("head", [(), "none"])
def test_no_head_makes_all_of_it_part_of_the_budget(head: Any) -> None:
    model = called("cls_head")
    sensitivity = measured(model, head=head)
    assert {"cls_head.weight", "cls_head.bias"} <= set(sensitivity)
    assert_exact(sensitivity, model, [(IMAGES, LABELS)])
    plan = spt.allocate(sensitivity, 50)
    assert (plan.head, plan.head_source) == ((), "given")
    spt.apply(model, plan)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 50


def test_a_head_that_leaves_nothing_or_is_not_there_is_refused() -> None:
    model = called("cls_head")
    with pytest.raises(ValueError, match="head: 'score' matches no parameter"):
        measured(model, head="score")
    with pytest.raises(ValueError, match=r"head: .* leaves nothing to measure"):
        measured(model, head=["*"], include=["*"])


def test_finding_it_costs_no_pass_of_the_model_besides_those_of_the_probe() -> None:
    sizes: list[int] = []
    model = called("score")
    model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    measured(model)
    assert sizes == [2, 2, 2, 4]


def test_files_keep_it_and_older_ones_do_without(tmp_path) -> None:
    from spt_kernels.files import checked_file

    sensitivity = measured(called("score"))
    sensitivity.save(tmp_path / "s")
    loaded = spt.Sensitivity.load(tmp_path / "s")
    assert (loaded.head, loaded.head_source) == (sensitivity.head, "loss")
    assert loaded.idle == ()

    def without(document: dict[str, Any], tensors: Any) -> tuple[dict[str, Any], Any]:
        document = {k: v for k, v in document.items() if k not in ("head_source", "idle")}
        return document, tensors

    document, tensors = checked_file.read(tmp_path / "s", "sensitivity", without)
    checked_file.write(tmp_path / "old", "sensitivity", document, tensors)
    old = spt.Sensitivity.load(tmp_path / "old")
    assert (old.head, old.head_source, old.idle) == (sensitivity.head, "", ())
    spt.allocate(old, 30).save(tmp_path / "p")
    document, tensors = checked_file.read(tmp_path / "p", "plan", without)
    assert "head_source" not in document
    checked_file.write(tmp_path / "old-plan", "plan", document, tensors)
    assert spt.Plan.load(tmp_path / "old-plan").head == sensitivity.head


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, r"head\.weight"),
        ({"head": "none", "include": ["pos_embed"]}, "pos_embed"),
    ],
)
def test_one_in_the_memory_of_another_parameter_is_refused_before_the_measurement(
    options: dict[str, Any], name: str
) -> None:
    model = tiny_vit(depth=1)
    model.head.weight.data = model.pos_embed.data[0, :CLASSES]
    told: list[int] = []
    with pytest.raises(ValueError, match=rf"^{name} is shared with .*: two parameters lie in one"):
        spt.measure_sensitivity(
            model, [(IMAGES, LABELS)], num_samples=4, progress=lambda *n: told.append(1), **options
        )
    assert not told

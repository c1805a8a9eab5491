"""The paper's contenders: how much each trains of ViT-B/16, where it starts, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.errors import BaseModelMismatch
from spt_kernels.methods import Method, make_plan, tune
from spt_kernels.methods.prompted import DroppingBlock, PromptedBlock, PromptedWindows
from spt_kernels.methods.tunable import Tunable
from spt_kernels.model import backbone_numel
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_convnext, tiny_resnet, tiny_swin, tiny_vit

from .every import method, tuned

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PROMPTS = ("prompt-shallow", "prompt-deep", "spt-prompt")
ON_MATRICES = ("adapter-2", "adaptformer", "lora-2", "spt-adapter-structured")
ON_MATRICES += ("sensitive-adapter-2", "sensitive-lora-2")
CONTENDERS = ("partial-1", "mlp-2", *PROMPTS, *ON_MATRICES)

WIDTH, MLP, BLOCKS = 768, 3072, 12
BLOCK = 4 * WIDTH**2 + 2 * WIDTH * MLP + 4 * WIDTH + WIDTH + MLP + 4 * WIDTH
BIASES = BLOCKS * (3 * WIDTH + WIDTH + MLP + WIDTH + 2 * WIDTH) + WIDTH

# by hand; the paper's share in per cent to as many digits as it prints, where it is the same
ON_VIT_B = {
    "full": (85_798_656, "100"),
    "linear": (0, None),
    "bias": (BIASES, None),
    "partial-1": (BLOCK + 2 * WIDTH, "8.3"),
    "mlp-3": (2 * (WIDTH**2 + WIDTH), "1.4"),
    "prompt-shallow": (50 * WIDTH, None),
    "prompt-deep": (46 * BLOCKS * WIDTH, None),
    "adapter-8": (BLOCKS * (2 * WIDTH * 8 + 8 + WIDTH), None),
    "adapter-32": (BLOCKS * (2 * WIDTH * 32 + 32 + WIDTH), None),
    "lora-8": (BLOCKS * 8 * (WIDTH + 3 * WIDTH), None),
    "lora-16": (BLOCKS * 16 * (WIDTH + 3 * WIDTH), "0.69"),
    "adaptformer": (BLOCKS * (2 * WIDTH * 64 + 64 + WIDTH), None),
}


@pytest.fixture(scope="module")
def vit_b() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=50)


@pytest.mark.parametrize("name", ON_VIT_B)
def test_what_is_trained_of_vit_b_is_counted_by_hand(name: str, vit_b: nn.Module) -> None:
    model = copy.deepcopy(vit_b)
    plan = make_plan(model, Method(name))
    # nothing is applied on meta tensors
    trained = tune(model, Method(name)).trained if plan is None else plan.num_trainable
    expected, papers = ON_VIT_B[name]
    assert trained == expected
    if papers is not None:
        digits = len(papers.partition(".")[2])
        assert f"{100 * trained / backbone_numel(vit_b):.{digits}f}" == papers


def scores_of(tunable: Tunable) -> Tensor:
    with torch.no_grad():
        return tunable.model.eval()(tiny_batch()[0])


@pytest.mark.parametrize("name", [*ON_MATRICES, "partial-1"])
def test_a_start_at_zero_is_the_base(name: str) -> None:
    expected = tiny_vit()(tiny_batch()[0])
    assert torch.equal(scores_of(tuned(name, tiny_vit())), expected)


@pytest.mark.parametrize("name", CONTENDERS)
def test_all_that_is_trained_moves_and_nothing_else(name: str) -> None:
    tunable = tuned(name, tiny_vit())
    images, target = tiny_batch()
    before = {n: t.clone() for n, t in tunable.model.state_dict().items()}
    optimizer = tunable.optimizer(weight_decay=0.0)
    for _ in range(3):  # the second is the first that has a gradient behind a zero
        nn.functional.cross_entropy(tunable.model.train()(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tunable.model.state_dict()
    moved = {n for n, tensor in after.items() if not torch.equal(tensor, before[n])}
    assert moved == {n for n, p in tunable.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONTENDERS)
def test_another_base_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    saved = tuned(name, tiny_vit())
    saved.save(tmp_path / "saved")
    other = tiny_vit()
    touched = "patch_embed.proj.weight"
    if saved.file == "task":
        assert saved.plan is not None
        touched = next(iter(saved.plan.structured))
    with torch.no_grad():
        other.get_parameter(touched).view(-1)[3] += 1.0
    tunable = tuned(name, other)
    before = scores_of(tunable)
    with pytest.raises(BaseModelMismatch):
        tunable.load(tmp_path / "saved")
    assert torch.equal(scores_of(tunable), before)


def registers() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5, reg_tokens=2
    )
    return model.eval()


def pooled() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=5, class_token=False, global_pool="avg").eval()


ELSEWHERE = [(name, make) for name in PROMPTS for make in (registers, pooled)]
ELSEWHERE += [
    (name, make)
    for name in CONTENDERS
    for make in (tiny_swin, tiny_convnext)
    if not name.endswith("-structured")  # whose scores put no module on the smallest
]
ELSEWHERE += [(name, tiny_resnet) for name in ("adapter-2", "lora-2")]


@pytest.mark.parametrize(("name", "make"), ELSEWHERE)
def test_other_architectures_come_back_to_the_bit(
    name: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    images, target = tiny_batch(size=16 if make in (registers, pooled) else 32)
    has_tokens = make is not tiny_convnext and (make is not tiny_swin or name != "prompt-shallow")
    if name in PROMPTS and not has_tokens:
        with pytest.raises(ValueError, match=f"'{name}' puts prompts among the tokens of a plain"):
            tuned(name, make())
        return
    tunable = tuned(name, make())
    optimizer = tunable.optimizer(lr=1e-2)
    for _ in range(2):
        nn.functional.cross_entropy(tunable.model(images), target).backward()
        optimizer.step()
    tunable.save(tmp_path / "saved")
    fresh = tuned(name, make())
    with torch.no_grad():
        expected = tunable.model.eval()(images)
        assert not torch.equal(fresh.model.eval()(images), expected)
        fresh.load(tmp_path / "saved")
        assert torch.equal(fresh.model(images), expected)
        if tunable.fold is not None:
            torch.testing.assert_close(tunable.deployed()(images), expected)


@pytest.mark.parametrize("name", ["adapter-2", "sensitive-lora-2", "spt-adapter-structured"])
def test_a_task_of_a_plan_is_unloaded_to_the_bit(name: str) -> None:
    tunable = tuned(name, tiny_vit())
    images, target = tiny_batch()
    for _ in range(2):
        nn.functional.cross_entropy(tunable.model(images), target).backward()
        tunable.optimizer(lr=1e-2).step()
    assert not torch.equal(scores_of(tunable), tiny_vit()(images))
    assert torch.equal(spt.unload(tunable.model)(images), tiny_vit()(images))


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("partial-3", {}, "method: VisionTransformer has 2 blocks, got 'partial-3'"),
        ("mlp-1", {}, "method: 'mlp-1' is 'linear'; expected mlp-2 or more"),
        ("mlp-2", {"head": "none"}, "head: 'mlp-2' needs one, VisionTransformer has none"),
        ("mlp-2", {"head": "norm"}, "head: 'mlp-2' puts layers before a linear one, norm is a"),
        ("adapter-25", {}, "method: expected a rank of at most 24, got 25"),
        ("adaptformer", {"rank": 25}, "rank: expected a width of at most 24, got 25"),
        ("prompt-shallow", {"budget": 23}, "budget: a prompt costs 24, got 23"),
        ("prompt-deep", {"budget": 47}, "budget: one prompt in each block costs 48, got 47"),
        ("spt-prompt", {"budget": 23}, "budget: a prompt costs 24 and more, got 23"),
        (
            "sensitive-lora-2",
            {"budget": 95},
            "budget: the smallest LoRA of rank 2 costs 96, got 95",
        ),
        (
            "sensitive-adapter-2",
            {"budget": 121},
            "budget: the smallest Adapter of rank 2 costs 122, got 121",
        ),
        (
            "sensitive-lora-24",
            {"budget": 500},
            "method: no matrix with sensitive parameters is larger than LoRA of rank 24",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    name: str, options: dict[str, object], problem: str
) -> None:
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^{problem}"):
        spt.methods[name](model, skewed_sensitivity(model), **options)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["partial-1", "adaptformer", "adapter-2"])
def test_a_model_without_blocks_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match=r"method: .*(no blocks|of each block; Sequential has)"):
        spt.methods[name](model)


def peaks(model: nn.Module, places: dict[str, int]) -> spt.Sensitivity:
    """Scores of 1 on so many entries of some parameters, of a millionth on all others."""
    made = skewed_sensitivity(model)
    scores = {}
    for name, values in made.items():
        scores[name] = torch.full(values.shape, 1e-6)
        scores[name].view(-1)[: places.get(name, 0)] = 1.0
    return spt.Sensitivity.from_tensors(
        scores, num_samples=1, info=made.info, head=made.head, backbone_numel=made.backbone_numel
    )


def test_a_module_goes_where_most_sensitive_parameters_are() -> None:
    model = tiny_vit()
    crowded = {"blocks.1.mlp.fc1.weight": 150, "blocks.0.attn.qkv.weight": 100}  # of q alone
    crowded["blocks.0.mlp.fc2.weight"] = 50
    scores = peaks(model, crowded)
    plan = make_plan(model, Method("sensitive-lora-2", 300), scores)
    assert plan is not None
    fc1, q = 2 * (24 + 96), 2 * (24 + 24)
    assert fc1 + q > 300  # what comes second no longer fits, and none of the others is sensitive
    assert {n: spec.rows for n, spec in plan.structured.items()} == {
        "blocks.1.mlp.fc1.weight": ((0, 96),)
    }
    crowded["blocks.1.mlp.fc1.weight"] = 60  # now after q; of both the budget has room for one
    plan = make_plan(model, Method("sensitive-lora-2", 210), peaks(model, crowded))
    assert plan is not None
    assert {n: spec.rows for n, spec in plan.structured.items()} == {
        "blocks.0.attn.qkv.weight": ((0, 24),)
    }
    assert plan.num_trainable == q <= plan.budget == 210


def test_prompts_go_to_blocks_in_proportion_to_their_sensitive_parameters() -> None:
    model = tiny_vit()
    scores = peaks(model, {"blocks.0.mlp.fc1.weight": 70, "blocks.1.attn.qkv.weight": 170})
    tunable = spt.methods["spt-prompt"](model, scores, budget=240)  # ten prompts of width 24
    counts = [len(block.prompts) for block in tunable.model.blocks]
    assert counts == [3, 7]  # 10 · 70 / 240 = 2.9
    assert tunable.trained == 240
    alone = spt.methods["spt-prompt"](
        tiny_vit(), peaks(tiny_vit(), {"blocks.1.attn.qkv.weight": 240}), budget=240
    )
    first, second = alone.model.blocks
    assert not isinstance(first, PromptedBlock)
    assert len(second.prompts) == 10


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(
    ("make", "tie"),
    [
        (lambda: Beit(**SIZES, use_rel_pos_bias=True), "relative_position_index"),
        (lambda: Beit(**SIZES, use_shared_rel_pos_bias=True), "rel_pos_bias"),
        (lambda: Eva(**SIZES, use_rot_pos_emb=True), "rope"),
        (lambda: VisionTransformerRelPos(**SIZES), "rel_pos"),
    ],
    ids=["beit", "shared", "eva", "relpos"],
)
def test_no_prompts_among_tokens_that_are_tied_to_their_places(
    name: str, make: Callable[[], nn.Module], tie: str
) -> None:
    model = make()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"{name}.*tied to their places by .*{tie}"):
        spt.methods[name](model, skewed_sensitivity(model) if name == "spt-prompt" else None)
    assert [p.requires_grad for p in model.parameters()] == before


def test_prompts_differ_from_each_other() -> None:
    for name in PROMPTS:
        for module in tuned(name, tiny_vit()).model.modules():
            if isinstance(module, PromptedBlock):
                assert len(module.prompts.unique(dim=0)) == len(module.prompts)


@pytest.mark.parametrize("shifted", [False, True])
def test_prompted_windows_are_attention_over_tokens_and_prompts(shifted: bool) -> None:
    block = tiny_swin().layers[0].blocks[1]  # windows of 4 × 4 in 8 × 8 tokens, shifted
    mask = block.attn_mask if shifted else None
    assert block.attn_mask is not None
    x = torch.randn(8, 16, 12)  # two images of four windows
    nothing = PromptedWindows(block.attn, nn.Parameter(torch.empty(0, 12)), block.norm1)
    torch.testing.assert_close(nothing(x, mask), block.attn(x, mask=mask))

    prompts = nn.Parameter(torch.randn(3, 12))
    given = block.norm1(prompts)
    attention, expected = block.attn, []
    places = attention.relative_position_index
    bias = attention.relative_position_bias_table[places].permute(2, 0, 1)  # [heads, 16, 16]
    for window, tokens in enumerate(x):
        own = attention.qkv(torch.cat((tokens, given))).reshape(19, 3, 2, 6)
        q, k, v = own.permute(1, 2, 0, 3)  # [heads, tokens and prompts, 6] each
        scores = q[:, :16] @ k.mT / 6**0.5
        scores[..., :16] += bias if mask is None else bias + mask[window % 4]
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(16, 12)
        expected.append(attention.proj(y))
    prompted = PromptedWindows(attention, prompts, block.norm1)
    torch.testing.assert_close(prompted(x, mask), torch.stack(expected))


class Counting(nn.Module):
    """A block that only notes how many tokens it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        return x


def test_shallow_prompts_stay_to_the_last_block_and_leave_the_tokens_in_order() -> None:
    first, last = Counting(), Counting()
    stack = nn.Sequential(
        PromptedBlock(first, nn.Parameter(torch.zeros(3, 4)), 1, stay=True),
        DroppingBlock(last, 3, 1),
    )
    x = torch.randn(2, 6, 4)
    assert torch.equal(stack(x), x)
    assert (first.seen, last.seen) == ([9], [9])


def test_an_mlp_head_is_layers_before_the_one_that_was_there() -> None:
    model = tiny_vit()
    features = model.forward_head(model.forward_features(tiny_batch()[0]), pre_logits=True)
    tunable = tune(model, Method("mlp-3"))
    head = tunable.model.head
    x = features
    for layer in [m for m in head.hidden if isinstance(m, nn.Linear)]:
        x = torch.relu(x @ layer.weight.T + layer.bias)
    expected = x @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(scores_of(tunable), expected)
    assert (tunable.trained, tunable.in_head) == (2 * (24 * 24 + 24), 5 * 24 + 5)


def test_adaptformers_bottleneck_is_beside_the_mlp() -> None:
    tunable = tuned("adaptformer", tiny_vit())
    mlp = tunable.model.blocks[0].mlp
    nn.init.normal_(mlp.up.weight)
    x = torch.randn(2, 5, 24)
    low = torch.relu(x @ mlp.down.weight.T)
    torch.testing.assert_close(mlp(x), mlp.base(x) + 0.1 * (low @ mlp.up.weight.T))


def test_the_last_blocks_are_trained_with_what_lies_between_and_after_them() -> None:
    tunable = tune(tiny_swin(), Method("partial-3"))
    trained = {n for n, p in tunable.model.named_parameters() if p.requires_grad}
    kept = ("layers.0.blocks.1.", "layers.1.", "norm.", "head.")
    assert trained == {n for n, _ in tunable.model.named_parameters() if n.startswith(kept)}


@pytest.mark.parametrize("name", CONTENDERS)
def test_under_autocast_and_in_sixteen_bits(name: str) -> None:
    images, target = tiny_batch()
    for model in (tiny_vit(), tiny_vit().bfloat16()):
        tunable = tuned(name, model)
        dtype = next(model.parameters()).dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = nn.functional.cross_entropy(tunable.model(images.to(dtype)), target)
        loss.backward()
        tunable.optimizer().step()
        trained = [p for p in tunable.model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_methods_of_one_family_are_of_one_size() -> None:
    assert method("adapter-2").size == 2
    assert spt.methods["adapter-3"](tiny_vit()).trained == 2 * (2 * 24 * 3 + 3 + 24)
    assert spt.methods["lora-1"](tiny_vit()).trained == 2 * (24 + 3 * 24)

"""Plans that leave early blocks alone: against what models call before a block, and a walk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spt_kernels.model import describe
from spt_kernels.plan import Plan, allocate, allocate_each
from spt_kernels.plan.blocks import block_named, blocks_in_order, names_below
from spt_kernels.sensitivity import Sensitivity, skewed_sensitivity
from tests.models import tiny_convnext, tiny_resnet, tiny_swin, tiny_vit

# ---- what lies below a block


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
    )
    return transformers.ViTForImageClassification(config).eval()


def transformers_swin() -> nn.Module:
    """Its stages end with a downsampling, where timm's begin with one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config).eval()


def torchvision_vit() -> nn.Module:
    vision = pytest.importorskip("torchvision.models.vision_transformer")
    return vision.VisionTransformer(16, 4, 2, 2, 12, 24).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "timm-vit": (lambda: tiny_vit(depth=3), 16, 3),
    "timm-swin": (tiny_swin, 32, 4),
    "timm-convnext": (tiny_convnext, 32, 4),
    "timm-resnet": (tiny_resnet, 32, 4),
    "transformers-vit": (transformers_vit, 16, 3),
    "transformers-swin": (transformers_swin, 32, 4),
    "torchvision-vit": (torchvision_vit, 16, 2),
}


def made_of(tensor: Tensor) -> set[int]:
    """Parameters that a tensor was computed from, by autograd's graph."""
    found: set[int] = set()
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            waiting += [below for below, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_what_is_below_a_block_is_what_its_input_was_made_of(name: str) -> None:
    make, size, number = MODELS[name]
    model = make()
    info = describe(model)
    blocks = blocks_in_order(info)
    assert len(blocks) == number
    given: dict[str, set[int]] = {}
    for block in blocks:
        model.get_submodule(block).register_forward_pre_hook(
            lambda _, inputs, block=block: given.update({block: made_of(inputs[0])})
        )
    output = model(torch.zeros(1, 3, size, size))
    used = made_of(output if isinstance(output, Tensor) else output.logits)
    parameters = {n: p for n, p in model.named_parameters() if id(p) in used}
    for place, block in enumerate(blocks):
        assert block_named(info, place) == block_named(info, block) == block
        below = names_below(info, block) & parameters.keys()
        assert below == {n for n, p in parameters.items() if id(p) in given[block]}


def test_tokens_and_positions_are_below_the_first_block_in_any_order() -> None:
    names = describe(tiny_vit())
    info = {name: names[name] for name in sorted(names)}  # as a dict of one's own may have them
    assert names_below(info, "blocks.0") == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    }
    assert "norm.weight" not in names_below(info, "blocks.1")


def test_a_stage_stands_for_its_first_block() -> None:
    info = describe(tiny_swin())
    assert block_named(info, "layers.1") == block_named(info, 2) == "layers.1.blocks.0"


def test_numbers_of_one_row_of_blocks_are_those_of_their_names() -> None:
    info = {n: what for n, what in describe(tiny_vit(depth=12)).items() if "blocks.0." not in n}
    assert block_named(info, 10) == "blocks.10"
    with pytest.raises(ValueError, match=r"a block from 1 \(blocks.1\) to 11 \(blocks.11\), or"):
        block_named(info, 0)


@pytest.mark.parametrize("block", [3, -1, "blocks.3", "block", "blocks.1.mlp", ""])
def test_a_block_that_is_not_there(block: int | str) -> None:
    with pytest.raises(ValueError, match=r"from_block: expected a block from 0 \(blocks.0\) to 2"):
        block_named(describe(tiny_vit(depth=3)), block)


def test_names_without_blocks_and_other_types() -> None:
    plain = Sensitivity.from_tensors({"first.weight": torch.rand(4, 4)}, 1)
    with pytest.raises(ValueError, match=r"from_block: the names .* tell no blocks.*first.weight"):
        allocate(plain, 3, from_block=0)
    for value in (True, 1.5):
        with pytest.raises(TypeError, match="from_block must be a block's number or its name"):
            allocate(scores(), 10, from_block=value)  # type: ignore[arg-type]


# ---- plans


def scores() -> Sensitivity:
    return skewed_sensitivity(tiny_vit(depth=4, width=12))


def alone(sensitivity: Sensitivity, block: str) -> Sensitivity:
    """The same scores without those below a block."""
    below = names_below(sensitivity.info, block)
    kept = {name: score for name, score in sensitivity.items() if name not in below}
    return replace(sensitivity, scores=kept, info={n: sensitivity.info[n] for n in kept})


@pytest.mark.parametrize("rule", ["paper", "published-code"])
@pytest.mark.parametrize("structured", ["lora", "adapter", None])
def test_it_is_the_plan_of_what_is_left(structured: str | None, rule: str) -> None:
    sensitivity = scores()
    plans = allocate_each(sensitivity, [200, 90], structured, 1, rule=rule, from_block=2)
    for budget, plan in zip((200, 90), plans, strict=True):
        rest = allocate(alone(sensitivity, "blocks.2"), budget, structured, 1, rule=rule)
        assert plan.structured == rest.structured
        assert plan.unstructured.keys() == rest.unstructured.keys()
        for name, positions in rest.unstructured.items():
            assert torch.equal(plan.unstructured[name], positions)
        below = names_below(sensitivity.info, "blocks.2")
        assert {n: c for n, c in plan.selected.items() if n not in below} == rest.selected
        assert not any(sum(plan.selected[name]) for name in below & plan.selected.keys())
        assert plan.info == sensitivity.info
        assert plan.from_block == "blocks.2"
        assert rest.from_block == ""
        assert rest.forgone == 0.0


def worth(sensitivity: Sensitivity, budget: int, structured: str | None) -> float:
    """The most that so many scores can sum up to, where a LoRA of rank 1 pays for a matrix."""
    values: list[np.ndarray] = []
    for name, score in sensitivity.items():
        info = sensitivity.info[name]
        for rows in info.row_blocks:
            own = np.sort(score[rows.start : rows.stop].double().numpy().ravel())[::-1]
            if structured and info.takes_modules:
                own = own[: rows.stop - rows.start + info.shape[1]]
            values.append(own)
    return float(np.sort(np.concatenate(values))[::-1][:budget].sum())


@pytest.mark.parametrize("structured", ["lora", None])
def test_its_cost_in_sensitivity_is_told(structured: str | None) -> None:
    sensitivity = scores()
    whole = worth(sensitivity, 120, structured)
    told = []
    for block in ("blocks.0", "blocks.1", "blocks.2", "blocks.3"):
        plan = allocate(sensitivity, 120, structured, 1, from_block=block)
        own = worth(alone(sensitivity, block), 120, structured)
        assert plan.forgone == pytest.approx(1 - own / whole, abs=1e-9)
        told.append(plan.forgone)
        share = f"{100 * plan.forgone:.1f} % forgone" if plan.forgone >= 0.01 else "% forgone"
        assert f"from        {block} on" in plan.summary()
        assert share in plan.summary(200)
    assert told == sorted(told)
    assert told[0] == 0.0
    assert told[-1] > 0.1


def paid_for(sensitivity: Sensitivity, plan: Plan) -> float:
    """What a plan trains: entries by their own scores, a module for as many of the highest."""
    total = sum(
        float(sensitivity[n].double().ravel()[p].sum()) for n, p in plan.unstructured.items()
    )
    for name, spec in plan.structured.items():
        for rows in spec.rows:
            own = sensitivity[name][slice(*rows)].double().numpy().ravel()
            total += float(np.sort(own)[::-1][: replace(spec, rows=(rows,)).num_parameters].sum())
    return total


@pytest.mark.parametrize("structured", ["lora", "adapter"])
@pytest.mark.parametrize("budget", [120, 200])
def test_its_cost_by_the_published_rule_is_that_of_whole_modules(
    structured: str, budget: int
) -> None:
    sensitivity, rule = scores(), "published-code"
    whole = paid_for(sensitivity, allocate(sensitivity, budget, structured, 1, rule=rule))
    for block in (1, 3):
        plan = allocate(sensitivity, budget, structured, 1, rule=rule, from_block=block)
        assert plan.structured
        share = 1 - paid_for(sensitivity, plan) / whole
        assert plan.forgone == pytest.approx(share, abs=1e-9)


def test_a_budget_beyond_what_is_left() -> None:
    with pytest.raises(ValueError, match=r"more than can be spent: at most .*, from blocks.3 on"):
        allocate(scores(), 1500, rank=1, from_block=3)


def test_files_hold_it_and_older_ones_are_read(tmp_path: Path) -> None:
    plan = allocate(scores(), 120, rank=1, from_block="blocks.1")
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    whole = allocate(scores(), 120, rank=1)
    document = whole.to_json()
    assert not {"from_block", "forgone"} & document.keys()  # as before there were any
    assert Plan.from_json(document, whole.unstructured) == whole
    assert whole != plan


def test_a_plan_that_trains_what_it_forbids_cannot_be_made() -> None:
    whole = allocate(scores(), 120, None)
    with pytest.raises(ValueError, match=r"from_block: 'blocks.0.* lies before blocks.2, and is"):
        replace(whole, from_block="blocks.2")
    with pytest.raises(ValueError, match="expected a block from 0"):
        replace(whole, from_block="blocks.9")
    with pytest.raises(ValueError, match=r"forgone must be a share from 0 to 1, got 1\.5"):
        replace(whole, forgone=1.5)


# ---- the plan that fits


def peaks(*by_block: int) -> Iterator[tuple[Callable[[Plan], int], list[str]]]:
    """A peak for the plan of all blocks and for that from each, and who was asked for it."""
    asked: list[str] = []
    table = dict(zip(("", *(f"blocks.{n}" for n in range(12))), by_block, strict=True))

    def peak_of(plan: Plan) -> int:
        asked.append(plan.from_block)
        return table[plan.from_block]

    yield peak_of, asked


def test_as_few_blocks_are_forbidden_as_must_be() -> None:
    sensitivity = skewed_sensitivity(tiny_vit(depth=12, width=12))
    falling = (100, 100, 91, 85, 70, 66, 60, 50, 41, 40, 30, 20, 10)
    for limit, start in itertools.product((10, 41, 69.5, 100), (None, 5)):
        [(peak_of, asked)] = peaks(*falling)
        plan = allocate(
            sensitivity, 50, None, from_block=start, memory_bytes=limit, peak_of=peak_of
        )
        first = next(
            n for n, peak in enumerate(falling) if peak <= limit and (start is None or n > start)
        )
        assert plan.from_block == ("" if first == 0 else f"blocks.{first - 1}")
        assert plan == allocate(sensitivity, 50, None, from_block=plan.from_block or None)
        assert len(asked) == len(set(asked)) <= 6


def test_nothing_fits() -> None:
    sensitivity = skewed_sensitivity(tiny_vit(depth=12, width=12))
    [(peak_of, _)] = peaks(*(n * 2**30 for n in range(13, 0, -1)))
    with pytest.raises(
        ValueError, match=r"least .* is 1.000 GiB, by the plan from blocks.11 on, g"
    ):
        allocate(sensitivity, 50, None, memory_bytes=2**29, peak_of=peak_of)
    # what one block has room for is below the budget
    with pytest.raises(ValueError, match=r"from blocks.10 on, .*: a smaller budget, for which lat"):
        allocate(sensitivity, 3000, None, memory_bytes=2**29, peak_of=peak_of)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"memory_bytes": 5}, ValueError, "memory_bytes and peak_of go together"),
        ({"peak_of": len}, ValueError, "memory_bytes and peak_of go together"),
        ({"memory_bytes": "5", "peak_of": len}, TypeError, "must be a number of bytes, got '5'"),
        ({"memory_bytes": 0.5, "peak_of": len}, ValueError, "must be at least 1, got 0.5"),
        ({"memory_bytes": 5, "peak_of": 5}, TypeError, "peak_of must be a function of a Plan"),
    ],
    ids=["no-peak", "no-memory", "text", "nothing", "number"],
)
def test_a_memory_that_is_none(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        allocate(scores(), 50, **arguments)

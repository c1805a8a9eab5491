"""Allocation and plans: the selection of Eq. 4 and Eq. 5 against a walk over the sorted scores."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from spt_kernels import native
from spt_kernels.errors import DeltaFormatError
from spt_kernels.files import checked_file
from spt_kernels.files.container import pack
from spt_kernels.plan import AdapterSpec, LoraSpec, Plan, allocate, allocate_each, table
from spt_kernels.sensitivity import Sensitivity

from .score_reads import ScoreReads

# parameter -> shape; the fused qkv is three matrices, the convolution never structured
SHAPES = {
    "blocks.0.norm1.weight": (6,),
    "blocks.0.attn.qkv.weight": (18, 6),
    "blocks.0.attn.qkv.bias": (18,),
    "blocks.0.mlp.fc1.weight": (20, 6),
    "blocks.0.mlp.fc2.weight": (6, 20),
    "stages.1.conv_dw.weight": (8, 1, 3, 3),
}
MATRICES = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
MODEL = {"model_name": "toy", "head": ("head.weight",), "backbone_numel": 1000}


def scored(values: dict[str, Tensor]) -> Sensitivity:
    return Sensitivity.from_tensors(values, 10, **MODEL)


def random_scores(seed: int, *, distinct_values: int | None = None) -> Sensitivity:
    """Scores of the toy model; few distinct values (0 among them) make many ties."""
    rng = np.random.default_rng(seed)
    return scored(
        {
            name: torch.from_numpy(
                rng.random(shape) * rng.choice([0.2, 1, 5])
                if distinct_values is None
                else rng.integers(0, distinct_values, shape).astype(np.float64)
            )
            for name, shape in SHAPES.items()
        }
    )


def toy_segments() -> list[tuple[str, int, int]]:
    """(parameter, first row, past the last row) in the order of the model."""
    segments = []
    for name, shape in SHAPES.items():
        bounds = [0, 6, 12, 18] if "qkv" in name else [0, shape[0]]
        segments += [(name, a, b) for a, b in itertools.pairwise(bounds)]
    return segments


# trained entries, structured row ranges, and how many entries of each row block were selected
Outcome = tuple[dict[str, set[int]], dict[str, list[tuple[int, int]]], dict[tuple[str, int], int]]


def cost_of(name: str, rows: int, structured: str | None, rank: int) -> int:
    """σ: a LoRA has matrices [rank, in] and [rows, rank], an Adapter two and their biases."""
    if structured == "lora":
        return rank * SHAPES[name][1] + rows * rank
    return 2 * rank * rows + rank + rows


def brute_force(
    sensitivity: Sensitivity, budget: int, structured: str | None, rank: int, rule: str = "paper"
) -> Outcome:
    """Sort every score, walk down one by one, and cost each prefix from scratch."""
    segments = toy_segments()
    entries = []
    for m, (name, first, last) in enumerate(segments):
        scores = sensitivity[name].numpy()
        width = scores[0].size
        for position in range(first * width, last * width):
            entries.append((-scores.reshape(-1)[position], m, position))
    entries.sort()

    def step(m: int, taken: set[int]) -> tuple[str, int]:
        name, first, last = segments[m]
        shape = SHAPES[name]
        numel = (last - first) * math.prod(shape[1:])
        if name in MATRICES and structured:
            sigma = cost_of(name, last - first, structured, rank)
            if len(taken) >= (sigma if rule == "paper" else sigma / 10):
                return "structured", sigma
        is_vector = len(shape) == 1
        if rule == "published-code" and is_vector and len(taken) >= numel / 5 and taken:
            return "whole", numel
        return "entries", len(taken)

    chosen: list[set[int]] = [set() for _ in segments]
    best = [set(s) for s in chosen]
    best_cost = 0
    for value, m, position in entries:
        if value == 0 or best_cost == budget:
            break
        chosen[m].add(position)
        cost = sum(step(i, taken)[1] for i, taken in enumerate(chosen))
        if cost > budget:
            break
        if cost > best_cost:
            best, best_cost = [set(s) for s in chosen], cost

    unstructured: dict[str, set[int]] = {}
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for m, (name, first, last) in enumerate(segments):
        width = math.prod(SHAPES[name][1:])
        what = step(m, best[m])[0]
        if what == "structured":
            rows_of.setdefault(name, []).append((first, last))
        elif what == "whole":
            whole = range(first * width, last * width)
            unstructured.setdefault(name, set()).update(whole)
        elif best[m]:
            unstructured.setdefault(name, set()).update(best[m])
    counts = {}
    for m, (name, first, _) in enumerate(segments):
        if best[m]:
            counts[name, first // 6 if "qkv" in name else 0] = len(best[m])
    return unstructured, rows_of, counts


def as_sets(plan: Plan) -> Outcome:
    return (
        {name: set(positions.tolist()) for name, positions in plan.unstructured.items()},
        {name: list(spec.rows) for name, spec in plan.structured.items()},
        {(name, m): n for name, counts in plan.selected.items() for m, n in enumerate(counts) if n},
    )


CHOICES = [("lora", 1), ("lora", 2), ("adapter", 1), ("adapter", 3), (None, 8)]


@pytest.mark.parametrize("budget", [1, 7, 40, 100, 150])
@pytest.mark.parametrize(("structured", "rank"), CHOICES)
@pytest.mark.parametrize("distinct_values", [None, 4], ids=["no-ties", "ties"])
def test_paper_rule_is_the_walk(
    structured: str | None, rank: int, budget: int, distinct_values: int | None
) -> None:
    sensitivity = random_scores(budget, distinct_values=distinct_values)
    plan = allocate(sensitivity, budget, structured, rank)
    assert as_sets(plan) == brute_force(sensitivity, budget, structured, rank)
    assert plan.num_trainable == budget


@pytest.mark.parametrize("budget", [5, 7, 40, 100, 150])
@pytest.mark.parametrize(("structured", "rank"), CHOICES)
@pytest.mark.parametrize("distinct_values", [None, 4], ids=["no-ties", "ties"])
def test_published_rule_is_the_walk(
    structured: str | None, rank: int, budget: int, distinct_values: int | None
) -> None:
    sensitivity = random_scores(budget, distinct_values=distinct_values)
    expected = brute_force(sensitivity, budget, structured, rank, "published-code")
    if expected == ({}, {}, {}):
        with pytest.raises(ValueError, match="buys nothing"):
            allocate(sensitivity, budget, structured, rank, rule="published-code")
        return
    plan = allocate(sensitivity, budget, structured, rank, rule="published-code")
    assert as_sets(plan) == expected
    assert plan.num_trainable <= budget


def allocate_if_possible(
    sensitivity: Sensitivity, budget: int, choice: tuple[str | None, int]
) -> Plan | None:
    try:
        return allocate(sensitivity, budget, *choice, rule="published-code")
    except ValueError:
        return None


scores_strategy = st.integers(0, 2**32 - 1).flatmap(
    lambda seed: st.sampled_from([None, 2, 3, 10]).map(
        lambda distinct: random_scores(seed, distinct_values=distinct)
    )
)
choices_strategy = st.sampled_from(CHOICES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores_strategy, choices_strategy, st.integers(1, 150))
def test_property_exact_spend(
    sensitivity: Sensitivity, choice: tuple[str | None, int], budget: int
) -> None:
    unstructured, rows, _ = brute_force(sensitivity, 10**9, *choice)
    assert allocate(sensitivity, 1, *choice).num_trainable == 1
    every = sum(map(len, unstructured.values())) + sum(
        cost_of(name, last - first, *choice) for name, r in rows.items() for first, last in r
    )
    budget = min(budget, every)
    assert allocate(sensitivity, budget, *choice).num_trainable == budget


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores_strategy, choices_strategy, st.integers(6, 120))
def test_property_published_rule_keeps_the_budget(
    sensitivity: Sensitivity, choice: tuple[str | None, int], budget: int
) -> None:
    plan = allocate_if_possible(sensitivity, budget, choice)
    assert plan is None or 0 < plan.num_trainable <= budget


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores_strategy, choices_strategy, st.integers(1, 60), st.integers(0, 40))
def test_property_monotone(
    sensitivity: Sensitivity, choice: tuple[str | None, int], budget: int, more: int
) -> None:
    small = allocate(sensitivity, budget, *choice)
    large = allocate(sensitivity, budget + more, *choice)
    for name, counts in small.selected.items():
        assert all(a <= b for a, b in zip(counts, large.selected[name], strict=True))
    for name, spec in small.structured.items():
        assert set(spec.rows) <= set(large.structured[name].rows)
    for name, positions in small.unstructured.items():
        covered = set(large.unstructured.get(name, torch.empty(0)).tolist())
        width = math.prod(SHAPES[name][1:])
        for first, last in large.structured[name].rows if name in large.structured else ():
            covered |= set(range(first * width, last * width))
        assert set(positions.tolist()) <= covered


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scores_strategy, choices_strategy, st.integers(1, 60), st.sampled_from([2.0**-20, 2.0**30]))
def test_property_scale_does_not_matter(
    sensitivity: Sensitivity, choice: tuple[str | None, int], budget: int, factor: float
) -> None:
    scaled = scored({name: score * factor for name, score in sensitivity.items()})
    assert as_sets(allocate(sensitivity, budget, *choice)) == as_sets(
        allocate(scaled, budget, *choice)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1000), choices_strategy, st.integers(1, 150), st.permutations(list(SHAPES)))
def test_property_order_matters_only_for_ties(
    seed: int, choice: tuple[str | None, int], budget: int, order: list[str]
) -> None:
    sensitivity = random_scores(seed)
    shuffled = scored({name: sensitivity[name] for name in order})
    assert as_sets(allocate(sensitivity, budget, *choice)) == as_sets(
        allocate(shuffled, budget, *choice)
    )


def test_ties_go_to_the_earlier_parameter_then_to_the_lower_position() -> None:
    sensitivity = scored({name: torch.ones(shape) for name, shape in SHAPES.items()})
    plan = allocate(sensitivity, 10, None)
    assert plan.unstructured["blocks.0.norm1.weight"].tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.unstructured["blocks.0.attn.qkv.weight"].tolist() == [0, 1, 2, 3]
    assert list(plan.unstructured) == ["blocks.0.norm1.weight", "blocks.0.attn.qkv.weight"]


def test_one_slice_of_a_fused_matrix_is_structured() -> None:
    scores = {name: torch.full(shape, 0.1) for name, shape in SHAPES.items()}
    qkv = scores["blocks.0.attn.qkv.weight"]
    qkv[6:12] = 5.0  # all of k
    qkv[0, 3] = 4.0  # one entry of q
    plan = allocate(scored(scores), 13, "lora", rank=1, scale=2.0, dropout=0.25)
    spec = plan.structured["blocks.0.attn.qkv.weight"]
    assert spec == LoraSpec(1, ((6, 12),), in_features=6, scale=2.0, dropout=0.25)
    assert plan.unstructured["blocks.0.attn.qkv.weight"].tolist() == [3]
    assert plan.selected["blocks.0.attn.qkv.weight"] == (1, 36, 0)
    assert (plan.num_structured, plan.num_unstructured) == (12, 1)


@pytest.mark.parametrize("count", [11, 12], ids=["below-sigma", "at-sigma"])
def test_threshold_is_sigma(count: int) -> None:
    scores = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    scores["blocks.0.attn.qkv.weight"].view(-1)[:count] = 1.0
    plan = allocate(scored(scores), count, "lora", rank=1)  # σ of q is 1 · (6 + 6)
    assert bool(plan.structured) == (count == 12)
    assert bool(plan.unstructured) == (count == 11)


def test_a_module_dearer_than_its_matrix_is_never_put() -> None:
    sensitivity = random_scores(3)
    plan = allocate(sensitivity, 300, "lora", rank=50)
    assert not plan.structured
    assert plan.num_trainable == 300


def test_costs_of_the_specs() -> None:
    assert LoraSpec(8, ((0, 768), (1536, 2304)), 768).num_parameters == 2 * 8 * (768 + 768)
    assert AdapterSpec(8, ((0, 768),)).num_parameters == 2 * 8 * 768 + 8 + 768


def test_share_of_the_backbone_is_rounded_down() -> None:
    assert allocate(random_scores(0), 0.0259).num_trainable == 25  # of 1000
    assert allocate(random_scores(0), np.float32(0.5) / 10).budget == 50
    assert allocate(random_scores(0), np.int64(9)).budget == 9


def test_plan_remembers_how_it_was_made() -> None:
    plan = allocate(random_scores(0), 50, "adapter", 2, rule="published-code", dropout=0.0)
    kept = (plan.rule, plan.kind, plan.rank, plan.budget, plan.dropout, plan.num_samples)
    assert kept == ("published-code", "adapter", 2, 50, 0.0, 10)
    assert (plan.model_name, plan.head, plan.backbone_numel) == ("toy", ("head.weight",), 1000)


def test_scores_are_not_copied_nor_changed() -> None:
    sensitivity = random_scores(1)
    before = {name: score.clone() for name, score in sensitivity.items()}
    allocate(sensitivity, 30)
    assert all(torch.equal(before[name], sensitivity[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"budget": -3}, ValueError, "budget must be at least 1"),
        ({"budget": math.nan}, ValueError, "float in"),
        ({"budget": 1.0}, ValueError, "float in"),
        ({"budget": 400_000.0}, ValueError, "float in"),
        ({"budget": -0.1}, ValueError, "float in"),
        ({"budget": 1e-9}, ValueError, "no parameter"),
        ({"budget": True}, TypeError, "budget must be"),
        ({"budget": "10"}, TypeError, "budget must be"),
        ({"budget": 10**6, "structured": None}, ValueError, "at most 444 parameters"),
        ({"budget": 10**30, "structured": None}, ValueError, "at most 444 parameters"),
        ({"structured": "prefix"}, ValueError, "structured must be"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"rule": "alpha"}, ValueError, "rule must be"),
        ({"scale": math.inf}, ValueError, "scale must be"),
        ({"scale": 0.0}, ValueError, "scale must be"),
        ({"dropout": 1.0}, ValueError, "dropout must be"),
        ({"dropout": -0.1}, ValueError, "dropout must be"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"scale": None}, TypeError, "scale must be a number"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        allocate(random_scores(0), **{"budget": 10, **arguments})


@pytest.mark.parametrize("rule", ["paper", "published-code"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_bad_scores_name_the_parameter(value: float, rule: str) -> None:
    scores = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    scores["blocks.0.mlp.fc2.weight"][2, 3] = value
    for budget in (10, 10**6):  # also where it could not be spent
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2\.weight"):
            allocate(scored(scores), budget, rule=rule)


def test_scores_that_are_no_sensitivity_are_refused() -> None:
    with pytest.raises(TypeError, match=r"sensitivity must be a Sensitivity, got dict.*from_tens"):
        allocate({"fc.weight": torch.ones(2, 2)}, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["paper", "published-code"])
@pytest.mark.parametrize(("structured", "rank"), CHOICES)
def test_the_most_that_can_be_spent_is_said_and_can_be_spent(
    structured: str | None, rank: int, rule: str
) -> None:
    sensitivity = random_scores(5, distinct_values=3)
    with pytest.raises(ValueError, match="more than can be spent") as caught:
        allocate(sensitivity, 10**6, structured, rank, rule=rule)
    most = int(str(caught.value).split("at most ")[1].split()[0].replace(",", ""))
    assert allocate(sensitivity, most, structured, rank, rule=rule).num_trainable == most
    with pytest.raises(ValueError, match="more than can be spent"):
        allocate(sensitivity, most + 1, structured, rank, rule=rule)


# ---- the plan as a value


def example() -> Plan:
    return allocate(random_scores(3), 120, "lora", 1)


def assert_same(a: Plan, b: Plan) -> None:
    assert a.to_json() == b.to_json()
    assert list(a.info) == list(b.info)
    assert list(a.unstructured) == list(b.unstructured)
    for name, positions in a.unstructured.items():
        assert torch.equal(positions, b.unstructured[name])
        assert b.unstructured[name].dtype == torch.int64


def test_save_and_load(tmp_path: Path) -> None:
    plan = example()
    assert plan.structured
    assert plan.unstructured
    plan.save(tmp_path / "plan.safetensors")
    assert_same(plan, Plan.load(tmp_path / "plan.safetensors"))
    plan.save(tmp_path / "again.safetensors")
    first, second = ((tmp_path / n).read_bytes() for n in ("plan.safetensors", "again.safetensors"))
    assert first == second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.safetensors", "plan.safetensors"]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    scores = Sensitivity.from_tensors({"fc.weight": torch.rand(12, 8)}, num_samples=1)
    plan = allocate(
        scores, np.int64(20), rank=np.int64(1), scale=np.float32(0.5), dropout=np.float32(0.25)
    )
    assert plan.structured
    plan.save(tmp_path / "plan")
    assert_same(plan, Plan.load(tmp_path / "plan"))


def test_copies_are_equal() -> None:
    plan = example()
    assert_same(plan, copy.deepcopy(plan))
    assert_same(plan, pickle.loads(pickle.dumps(plan)))


def test_a_plan_is_frozen() -> None:
    plan = example()
    with pytest.raises(AttributeError):
        plan.budget = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.unstructured["x"] = torch.empty(0)  # type: ignore[index]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    example().save(path)
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(DeltaFormatError, match="cannot load the plan"):
            Plan.load(path)


@pytest.mark.parametrize("kept", [0, 7, 200, -1])
def test_a_cut_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "plan.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DeltaFormatError):
        Plan.load(path)


def test_another_file_and_another_format(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(DeltaFormatError, match="another kind of file"):
        Plan.load(path)
    for version, remedy in ((2, "make the plan again"), (4, "upgrade spt_kernels")):
        metadata = {"format": "spt_kernels.plan", "format_version": str(version), "plan": "{}"}
        path.write_bytes(pack(metadata, {"x": torch.ones(2)}))
        with pytest.raises(DeltaFormatError, match=f"version {version}, .* version 3: {remedy}"):
            Plan.load(path)
    random_scores(0).save(path)
    with pytest.raises(DeltaFormatError, match="not a plan"):
        Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "absent")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    example().save(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        allocate(random_scores(9), 20).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


QKV = "blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unstructured": {QKV: torch.tensor([3, 2])}}, "sorted"),
        ({"unstructured": {QKV: torch.tensor([2, 2])}}, "without duplicates"),
        ({"unstructured": {QKV: torch.tensor([108])}}, r"\[0, 108\)"),
        ({"unstructured": {QKV: torch.tensor([-1])}}, r"\[0, 108\)"),
        ({"unstructured": {QKV: torch.tensor([1], dtype=torch.int32)}}, "int64"),
        ({"unstructured": {"other.weight": torch.tensor([1])}}, "not among the candidates"),
        ({"structured": {QKV: LoraSpec(1, ((0, 6),), 7)}}, "in_features"),
        ({"structured": {QKV: LoraSpec(1, ((0, 19),), 6)}}, "rows must be"),
        ({"structured": {QKV: LoraSpec(1, ((6, 12), (0, 6)), 6)}}, "rows must be"),
        ({"structured": {QKV: LoraSpec(1, (), 6)}}, "no rows"),
        ({"structured": {QKV: AdapterSpec(0, ((0, 6),))}}, "rank"),
        ({"structured": {"blocks.0.norm1.weight": AdapterSpec(1, ((0, 6),))}}, "linear"),
        (
            {
                "unstructured": {QKV: torch.tensor([40])},
                "structured": {QKV: LoraSpec(1, ((6, 12),), 6)},
            },
            "rows that are structured",
        ),
        ({"selected": {QKV: (1, 2)}}, "3 counts"),
        ({"budget": 3}, "above its budget"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_impossible_plan_cannot_be_made(change: dict, message: str) -> None:
    plan = replace(example(), unstructured={QKV: torch.arange(6)}, structured={})
    with pytest.raises(ValueError, match=message):
        replace(plan, **change)


def test_a_plan_on_disk_is_checked_as_any(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan = replace(example(), structured={}, unstructured={QKV: torch.arange(6)})
    plan.save(path)
    assert load_file(path)[QKV].dtype == torch.int32
    checked_file.write(path, "plan", plan.to_json(), {QKV: torch.tensor([500])})
    with pytest.raises(DeltaFormatError, match=r"\[0, 108\)"):
        Plan.load(path)


def test_cells_add_up() -> None:
    plan = example()
    cells = plan.cells()
    assert sum(cell.numel for cell in cells.values()) == sum(map(math.prod, SHAPES.values()))
    assert sum(cell.trainable for cell in cells.values()) == plan.num_trainable
    assert sum(cell.unstructured for cell in cells.values()) == plan.num_unstructured
    assert sum(c.selected for c in cells.values()) == sum(map(sum, plan.selected.values()))
    assert cells["blocks.0", "k"].numel == 36
    assert cells["blocks.0", "bias"].numel == 18


def test_summary_is_aligned_and_says_it_all() -> None:
    plan = example()
    lines = plan.summary().splitlines()
    assert "trained     120 of a budget of 120, 12.0 % of the backbone" in lines
    assert any(line.startswith("head") and "head.weight" in line for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("block "))
    assert lines[start].split() == [
        *("block", "q", "k", "v", "fc1", "fc2", "conv_dw", "bias", "norm", "all", "share")
    ]
    rows = [line for line in lines[start:] if line.startswith(("block", "stages", "all"))]
    assert len({line.rindex("%") for line in rows[1:]}) == 1
    total = next(line for line in rows if line.startswith("all"))
    assert total.split()[-2:] == ["120", "100%"]
    structured = sum(len(spec.rows) for spec in plan.structured.values())
    assert sum(line.split().count("LoRA") for line in rows) == structured
    assert "LoRA: a LoRA in place of single parameters" in lines
    assert "LoRA:" not in replace(plan, structured={}).summary()


@pytest.mark.parametrize(("structured", "word"), [("lora", "LoRA"), ("adapter", "Adapt")])
def test_summary_of_a_vit_fits_a_terminal(structured: str, word: str) -> None:
    scores = {}
    for block in (9, 10):
        for part, shape in (
            ("attn.qkv", (2304, 768)), ("attn.proj", (768, 768)),
            ("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072)),
        ):  # fmt: skip
            scores[f"blocks.{block}.{part}.weight"] = torch.full(shape, 1e-3 / block)
        scores[f"blocks.{block}.norm1.weight"] = torch.ones(768)
        scores[f"blocks.{block}.mlp.fc1.bias"] = torch.ones(3072)
    for rule in ("paper", "published-code"):
        text = allocate(scored(scores), 150_000, structured, rule=rule).summary()
        assert word in text
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10.0k"), (99_949, "99.9k"), (99_950, "100k"),
     (999_499, "999k"), (999_500, "1.0M"), (999_499_999, "999M")],
)  # fmt: skip
def test_counts_of_the_summary_fit_five_characters(n: int, text: str) -> None:
    assert table._short(n) == text


# ---- several budgets


@pytest.mark.parametrize("rule", ["paper", "published-code"])
@pytest.mark.parametrize(("structured", "rank"), CHOICES)
@pytest.mark.parametrize("distinct_values", [None, 3, 40], ids=["no-ties", "ties", "some-ties"])
def test_several_budgets_are_each_allocated_as_alone(
    structured: str | None, rank: int, rule: str, distinct_values: int | None
) -> None:
    sensitivity = random_scores(rank, distinct_values=distinct_values)
    budgets = [40, 0.15, 20, 7, 150, 40]
    plans = allocate_each(sensitivity, budgets, structured, rank, rule=rule)
    for budget, plan in zip(budgets, plans, strict=True):
        assert_same(plan, allocate(sensitivity, budget, structured, rank, rule=rule))
        expected = brute_force(sensitivity, plan.budget, structured, rank, rule)
        assert as_sets(plan) == expected


@pytest.mark.parametrize("rule", ["paper", "published-code"])
def test_scores_that_are_all_zero_buy_nothing(rule: str) -> None:
    zeros = scored({"blocks.0.mlp.fc1.weight": torch.zeros(20, 6)})
    with pytest.raises(ValueError, match="at most 0 parameters"):
        allocate(zeros, 3, rule=rule)


def test_no_budget_is_no_plan() -> None:
    assert allocate_each(random_scores(0), []) == []
    assert allocate_each(random_scores(0), [], rule="published-code") == []


def test_one_impossible_budget_is_named() -> None:
    with pytest.raises(ValueError, match="budget=1,000,000 is more than can be spent"):
        allocate_each(random_scores(0), [10, 10**6])
    with pytest.raises(ValueError, match="budget must be at least 1 parameter, got 0"):
        allocate_each(random_scores(0), [10, 0])
    with pytest.raises(TypeError, match="budgets must be a sequence of budgets, got 10: see alloc"):
        allocate_each(random_scores(0), 10)  # type: ignore[arg-type]


@pytest.mark.skipif(not native.available(), reason=native.why_unavailable())
@pytest.mark.parametrize(
    ("n_budgets", "rule", "structured"),
    [
        *((1, rule, kind) for rule in ("paper", "published-code") for kind in ("lora", None)),
        *((79, "paper", kind) for kind in ("lora", "adapter", None)),
        (79, "published-code", "lora"),
    ],
)
def test_scores_are_read_at_most_four_times(
    n_budgets: int, rule: str, structured: str | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for block in range(2):
        scale = torch.rand(7, generator=generator).pow(3).tolist()
        for part, shape in (
            ("attn.qkv", (2304, 768)), ("attn.proj", (768, 768)),
            ("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072)), ("norm1", (768,)),
        ):  # fmt: skip
            score = torch.randn(shape, generator=generator).square_() * scale.pop()
            scores[f"blocks.{block}.{part}.weight"] = score
    sensitivity = scored(scores)
    budgets = [70_000 - 777 * i for i in range(n_budgets)]
    with ScoreReads(sensitivity.values()) as reads:
        plans = allocate_each(sensitivity, budgets, structured, rule=rule)
    assert [plan.num_trainable <= plan.budget for plan in plans] == [True] * n_budgets
    if structured:
        assert plans[0].structured
    assert 1 <= reads.passes <= 4

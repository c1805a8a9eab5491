"""The evidence: its statistics against numbers worked out by hand, its runs, and its page."""

from __future__ import annotations

import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import stats
from torch import nn

from bench.evidence import report, run
from bench.evidence.analysis import Comparison, compare, holm, signed_rank_p, t_interval
from bench.evidence.contender import Contender, Hypothesis, Run, Suite
from bench.evidence.pictures import pictures
from bench.evidence.record import Record, keep, path_of, read
from bench.evidence.scores import batch_squared, other_scores
from bench.evidence.setting import BUDGET, EFFICIENTNET, SUITES, VIT
from bench.evidence.tasks import GROUPS
from bench.evidence.weights import renamed, weights_file, with_new_head
from spt_kernels import Sensitivity
from spt_kernels.finetuning import ModelSource, Recipe
from spt_kernels.methods import Method

WANTED = (
    *("linear", "bias", "full", "lora-8", "lora-16", "adapter-8", "adaptformer", "prompt-deep"),
    *("spt-lora", "spt-adapter", "spt-unstructured"),
)


def record_of(suite: Suite, own: Run, accuracy: float) -> Record:
    contender = suite.contender(own.contender)
    trained = 0 if contender.method.name == "linear" else 1000
    return Record(
        suite.name,
        suite.digest_of(own.contender),
        own.task,
        own.contender,
        own.seed,
        contender.method.name,
        contender.method.budget,
        accuracy,
        trained,
        trained / 100_000,
        36.0,
        36.0,
        "Some CPU",
        1,
        {"torch": "9.0"},
        "abc",
    )


# --- the setting ---


def test_the_setting_is_whole() -> None:
    assert set(WANTED) <= {contender.name for contender in VIT.contenders}
    assert len(VIT.seeds) == 5
    assert len({GROUPS[task] for task in VIT.tasks}) == 3
    assert len(VIT.tasks) >= 6
    for suite in SUITES.values():
        names = [contender.name for contender in suite.contenders]
        assert len(set(names)) == len(names)
        assert set(suite.ablation_tasks) <= set(suite.tasks) <= set(GROUPS)
        for own in suite.hypotheses:
            assert {own.ours, own.theirs} <= set(names)
        assert len(set(suite.runs())) == len(suite.runs())
        asked = {name for own in suite.hypotheses for name in (own.ours, own.theirs)}
        order = [(run.contender not in asked, run.seed) for run in suite.runs()]
        assert order == sorted(order)  # what the questions need first, seed by seed


def test_what_questions_compare_is_trained_at_one_budget() -> None:
    # LoRA of rank 8 on six qkv of 192 × 576; an Adapter of width 15 on six outputs of 192
    assert BUDGET == 6 * 8 * (192 + 576)
    adapter = 6 * (2 * 15 * 192 + 15 + 192)
    assert BUDGET - 6 * (2 * 192 + 1) < adapter <= BUDGET
    assert BUDGET == 192 * 6 * 32  # prompts
    for own in VIT.hypotheses:
        for name in (own.ours, own.theirs):
            method = VIT.contender(name).method
            assert method.budget == BUDGET or name in ("lora-8", "adapter-15")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=12)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    biases = sum(norm.bias.numel() for norm in norms[1:])  # the stem stays as it is
    assert {c.method.budget for c in EFFICIENTNET.contenders} == {None, biases}


def test_a_digest_tells_settings_apart_and_survives_new_options() -> None:
    one = VIT.digest_of("spt-lora")
    assert one != VIT.digest_of("spt-lora, C = 400")
    assert one != VIT.digest_of("spt-lora, batch-squared")
    assert one != replace(VIT, recipe=replace(VIT.recipe, lr=1e-4)).digest_of("spt-lora")
    told = replace(VIT, title="other", notes=(), hypotheses=(), contenders=VIT.contenders[:3])
    assert told.digest_of("spt-lora") == one
    spelt_out = replace(VIT, recipe=replace(VIT.recipe, amp="none"))  # the default
    assert spelt_out.digest_of("spt-lora") == one


# --- statistics ---


def test_interval_by_hand() -> None:
    # mean 2.5, deviation √(5/3), error √(5/12), t(0.975; 3) = 3.182446
    low, high = t_interval([1.0, 2.0, 3.0, 4.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2.5 - 2.054260, 2.5 + 2.054260), abs=1e-5)
    assert t_interval([1.0]) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, None, 0.04, 0.03], 3) == [pytest.approx(0.03), None, 0.06, 0.06]
    assert holm([0.01, None], 4) == [pytest.approx(0.04), None]  # three are not there yet
    assert holm([0.9, 0.8], 2) == [1.0, 1.0]
    assert holm([], 0) == []


def test_questions_that_are_open_count_in_the_family() -> None:
    both = (Hypothesis("?", "ours", "theirs"), Hypothesis("?", "small", "ours"))
    own = suite(*both, tasks=("rotation",), seeds=6)
    made = compared(own, [51, 52, 53, 54, 55, 56], [50.0] * 6)
    assert made.adjusted == pytest.approx(2 * made.p)
    assert made.verdict == "no difference"


def suite(*hypotheses: Hypothesis, tasks: tuple[str, ...], seeds: int) -> Suite:
    return Suite(
        "made-up",
        "Made up",
        ModelSource("resnet18"),
        Recipe(),
        {},
        tasks,
        tasks[:1],
        tuple(range(seeds)),
        (
            Contender("ours", Method("spt-lora")),
            Contender("theirs", Method("lora-8")),
            Contender("small", Method("spt-lora", samples=100), is_ablation=True),
        ),
        hypotheses,
    )


def compared(own: Suite, ours: list[float], theirs: list[float]) -> Comparison:
    """Of one task: accuracies in points, seed by seed."""
    accuracies = {Run(own.tasks[0], "ours", seed): v / 100 for seed, v in enumerate(ours)}
    accuracies |= {Run(own.tasks[0], "theirs", seed): v / 100 for seed, v in enumerate(theirs)}
    return compare(own, accuracies, GROUPS)[0]


def test_six_differences_of_one_sign_reach_the_level() -> None:
    own = suite(Hypothesis("?", "ours", "theirs"), tasks=("rotation",), seeds=7)
    base = [50.0] * 7
    made = compared(own, [51, 52, 53, 54, 55, 56], base)
    assert made.differences == pytest.approx((1, 2, 3, 4, 5, 6))
    assert (made.n_planned, made.mean) == (7, pytest.approx(3.5))
    assert made.p == pytest.approx(2 / 2**6)
    assert made.verdict == "better"
    assert compared(own, [49, 48, 47, 46, 45, 44], base).verdict == "worse"
    # signed ranks 1, 2, 3, 4, 5 against 6: of 64 signs, 14 on each side give a sum of 6 or less
    mixed = compared(own, [51, 52, 53, 54, 55, 44], base)
    assert mixed.p == pytest.approx(2 * 14 / 64)
    assert mixed.verdict == "no difference"
    assert compared(own, [51, 52, 53, 54, 55], base).verdict == "open"
    assert compared(own, [50.0] * 6, base).p == 1.0


def test_signed_ranks_are_exact_with_ties_and_zeros() -> None:
    dice = np.random.default_rng(0)
    for n in (6, 15, 35):  # without ties scipy is exact, too
        values = dice.normal(0.3, 1.0, n)
        assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values).pvalue)
    # every choice of signs of 1, 1, 2, 2, 2, whose ranks are 1½, 1½, 4, 4, 4, is looked at
    ranks = [1.5, 1.5, 4.0, 4.0, 4.0]
    sums = [
        sum(r for r, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=5)
    ]
    assert signed_rank_p([-1, 1, 2, 2, 0, 2]) == 2 * sum(s <= 1.5 for s in sums) / 32
    assert signed_rank_p([0.0, 0.0]) == 1.0


def test_enough_means_that_the_whole_interval_is_above_the_margin() -> None:
    own = suite(Hypothesis("?", "ours", "theirs", margin=1.0), tasks=("rotation",), seeds=6)
    base = [50.0] * 6
    for ours, verdict in (
        ([50.0, 50.1, 49.9, 50.0, 50.1, 49.9], "enough"),
        ([45.0, 45.1, 44.9, 45.0, 45.1, 44.9], "not enough"),
        ([45.0, 55.0, 45.0, 55.0, 45.0, 55.0], "undecided"),
    ):
        made = compared(own, ours, base)
        assert (made.verdict, made.p) == (verdict, None)


def test_a_contrast_is_the_difference_of_means_inside_and_outside_a_group() -> None:
    own = suite(
        Hypothesis("?", "ours", "theirs", group="Structured"),
        tasks=("rotation", "counting", "blurred"),
        seeds=2,
    )
    gains = {("rotation", 0): 3, ("counting", 0): 5, ("blurred", 0): 1, ("rotation", 1): 9}
    accuracies = {Run(task, "theirs", seed): 0.5 for task, seed in gains}
    accuracies |= {Run(t, "ours", seed): 0.5 + gain / 100 for (t, seed), gain in gains.items()}
    [made] = compare(own, accuracies, GROUPS)
    assert made.differences == pytest.approx((3.0,))  # the second seed is not whole
    assert (made.n_planned, made.verdict) == (2, "open")


# --- scores ---


def test_batch_squared_is_the_square_of_the_mean_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    made = batch_squared(model, ["weight"], [(x[:4], y[:4]), (x[4:], y[4:])], 5)["weight"]
    expected = torch.zeros(4, 3).double()
    for rows in (range(4), range(4, 5)):
        errors = torch.softmax(x[rows] @ model.weight.T + model.bias, -1)
        errors[torch.arange(len(rows)), y[rows]] -= 1  # the gradient of cross entropy
        expected += (errors.T @ x[rows] / len(rows)) ** 2
    torch.testing.assert_close(made, expected.detach())
    with pytest.raises(ValueError, match="expected 7 samples, got 6"):
        batch_squared(model, ["weight"], [(x, y)], 7)


def test_other_scores_are_of_the_same_candidates() -> None:
    model = nn.Linear(3, 4)
    measured = Sensitivity.from_tensors({"weight": torch.ones(4, 3)}, 5)
    size = other_scores("magnitude", measured, model, [], 0)
    assert torch.equal(size["weight"], model.weight.detach().abs())
    chance = [other_scores("random", measured, model, [], seed)["weight"] for seed in (0, 0, 1)]
    assert torch.equal(chance[0], chance[1])
    assert not torch.equal(chance[0], chance[2])
    assert all((own > 0).all() for own in chance)
    assert size.info == measured.info
    with pytest.raises(ValueError, match="kind: expected"):
        other_scores("per-sample", measured, model, [], 0)


# --- weights ---


def test_weights_of_other_names_are_matched_by_place_shape_and_kind() -> None:
    own = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
    theirs = {"_x.weight": torch.ones(2, 3), "_x.bias": torch.ones(2)}
    assert {n: t.sum().item() for n, t in renamed(theirs, own).items()} == {
        "a.weight": 6,
        "a.bias": 2,
    }
    with pytest.raises(ValueError, match="expected 2 tensors, got 1"):
        renamed({"_x.weight": torch.ones(2, 3)}, own)
    with pytest.raises(ValueError, match=r"_x.weight \(2,\) is not a.bias"):
        renamed({"_y.weight": torch.ones(2, 3), "_x.weight": torch.ones(2)}, own)


def test_a_new_head_is_the_same_each_time(tmp_path: Path) -> None:
    state = {"classifier.weight": torch.zeros(1000, 9), "classifier.bias": torch.zeros(1000)}
    before = torch.random.get_rng_state()
    one, two = with_new_head(state, 12), with_new_head(state, 12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one["classifier.weight"].shape == (12, 9)
    assert torch.equal(one["classifier.weight"], two["classifier.weight"])
    with pytest.raises(ValueError, match=r"data: .* has no vit.safetensors"):
        weights_file("vit.safetensors", tmp_path, tmp_path)


# --- results and runs ---


def test_results_are_read_as_kept_and_others_refused(tmp_path: Path) -> None:
    path = path_of(VIT, tmp_path)
    one = record_of(VIT, VIT.runs()[0], 0.5)
    keep(one, path)
    assert read(VIT, path) == {VIT.runs()[0]: one}
    assert read(VIT, tmp_path / "none.jsonl") == {}
    for wrong, match in (
        (one, "is there twice"),
        (replace(one, seed=1, setting="0"), "is of another setting"),
        (replace(one, task="other"), "has no such run"),
    ):
        text = path.read_text()
        keep(wrong, path)
        with pytest.raises(ValueError, match=match):
            read(VIT, path)
        path.write_text(text)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="no result of a run"):
        read(VIT, path)


@pytest.fixture
def tiny(tmp_path: Path) -> Suite:
    """A suite of a model and a task that take no time; its folders are in `tmp_path`."""
    args = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    (tmp_path / "data").mkdir()
    save_file(model.state_dict(), tmp_path / "data" / "tiny.safetensors")
    for split, count in (("train", 4), ("val", 2), ("test", 5)):
        for label in ("1", "2"):
            folder = tmp_path / "work" / "tasks" / "Structured" / "counting" / split / label
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = np.full((16, 16, 3), 20 * n + 50 * int(label), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    budget = 400
    return Suite(
        "tiny",
        "Tiny",
        ModelSource("vit_tiny_patch16_224", args, "tiny.safetensors"),
        Recipe(epochs=1, batch_size=4),
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        ("counting",),
        ("counting",),
        (0,),
        (
            Contender("chance", Method("spt-unstructured", budget=budget), "random", True),
            Contender("linear", Method("linear")),
        ),
        (Hypothesis("Does it?", "chance", "linear"),),
    )


def test_runs_leave_a_line_each_and_are_not_repeated(tiny: Suite, tmp_path: Path) -> None:
    places = tmp_path / "data", tmp_path / "work", tmp_path / "results"
    assert run.run_missing(tiny, *places) == 2
    found = read(tiny, path_of(tiny, places[2]))
    assert list(found) == tiny.runs()
    assert [r.trained_parameters for r in found.values()] == [400, 0]
    assert all(0 <= r.test_accuracy <= 1 and r.seconds > 0 for r in found.values())
    assert run.run_missing(tiny, *places) == 0
    path = path_of(tiny, places[2])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # one is missing: it alone is done, to the same end
    assert run.run_missing(tiny, *places) == 1
    assert read(tiny, path)[tiny.runs()[-1]].test_accuracy == found[tiny.runs()[-1]].test_accuracy
    assert not list((tmp_path / "work" / "tiny").glob("*.scores.safetensors"))


def test_missing_data_are_told_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"--data": tmp_path / "nowhere", "--work": tmp_path / "work"}
    told = [str(word) for pair in places.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["run", *told, "--results", str(tmp_path / "results")])
    assert run.main() == 1
    assert "has no cifar10.tar.gz" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the page ---


def results(own: Suite, n_runs: int) -> dict[Run, Record]:
    """As many runs as that, of made-up accuracies: SPT-LoRA is better by two points or more."""
    dice = random.Random(0)
    return {
        run_: record_of(
            own,
            run_,
            0.6 + 0.02 * (run_.contender == "spt-lora") + dice.randrange(10) / 1000,
        )
        for run_ in own.runs()[:n_runs]
    }


def test_a_whole_page_answers_every_question() -> None:
    every = results(VIT, len(VIT.runs()))
    text = report.page({"vit": every}, {"vit": tuple(pictures(VIT, every))})
    line = next(line for line in text.splitlines() if "Does SPT-LoRA beat LoRA?" in line)
    assert "Yes: `spt-lora` is better than `lora-8` by" in line
    assert "35 pairs" in line
    for word in ("Not complete", "So far", "Open", "nan", "None", "†"):
        assert word not in text
    for own in VIT.hypotheses:
        assert f"*{own.question}*" in text
    for note in VIT.notes:
        assert note in text
    expected = [every[Run("rotation", "bias", seed)].test_accuracy for seed in VIT.seeds]
    mean = sum(expected) / 5
    error = math.sqrt(sum((v - mean) ** 2 for v in expected) / 4 / 5)
    assert f"{100 * mean:.1f} ± {100 * error:.1f}" in text
    assert "evidence/vit-budget.png" in text
    assert "evidence/vit-samples.png" in text


def test_a_suite_of_one_task_has_its_picture() -> None:
    every = results(EFFICIENTNET, len(EFFICIENTNET.runs()))
    [(name, draw)] = pictures(EFFICIENTNET, every).items()
    assert name == "efficientnet-budget.png"
    assert draw().axes


def test_a_page_of_some_runs_says_so() -> None:
    some = results(VIT, 80)
    text = report.page({"vit": some}, {})
    assert "**Not complete: 80 of 510 runs are there.**" in text
    line = next(line for line in text.splitlines() if "Does SPT-LoRA beat LoRA?" in line)
    assert "So far: Yes" in line
    assert "14 of 35 pairs" in line
    line = next(line for line in text.splitlines() if "400 samples enough" in line)
    assert "Open: 3 of 15 pairs" in line
    assert "†" in text
    nothing = report.page({"vit": {}}, {})
    assert "**Not complete: 0 of 510 runs are there.**" in nothing
    assert "nan" not in nothing
    # no mean over some of a group's tasks: of two seeds one has a gap
    partial = {own: r for own, r in results(VIT, 126).items() if own.task != "quadrant"}
    row = next(
        line
        for line in report.page({"vit": partial}, {}).splitlines()
        if line.startswith("| lora-8 |")
    )
    assert row.split("|")[6].strip() == "–"


def test_the_committed_page_is_what_the_results_say() -> None:
    if not report.PAGE.is_file():
        pytest.skip("there are no results yet")
    found = {name: read(own, path_of(own)) for name, own in SUITES.items()}
    drawn = {name: tuple(pictures(SUITES[name], own)) for name, own in found.items()}
    assert report.PAGE.read_text() == report.page(found, drawn)
    assert all((report.PICTURES / name).is_file() for own in drawn.values() for name in own)

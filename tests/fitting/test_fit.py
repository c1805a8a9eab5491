"""The fastest way that fits, against every way there is."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from spt_kernels.fitting import CARDS, Card, Fitted, Fitting
from spt_kernels.fitting.figure import frontier_figure, undominated
from spt_kernels.memory import estimate_memory
from spt_kernels.recomputation import blocks_by
from tests.models import tiny_convnext, tiny_vit

SHAPE = (3, 16, 16)
BATCH = 6
# of which arithmetic takes time and nothing else: no reason to compute anything again
SLOW = Card("slow", 1e-4, 1e-4, 1e9)
HOW = {"method": "spt-unstructured", "budget": 900}


@pytest.fixture(scope="module")
def fitting() -> Fitting:
    return Fitting(tiny_vit(), SHAPE, BATCH, card=CARDS["H100"], **HOW)


def every_way(fitting: Fitting) -> list[Fitted]:
    """Of equal parts and one level for all blocks."""
    sizes = sorted({-(-BATCH // parts) for parts in range(1, BATCH + 1)})
    return [fitting._way(n, level) for n, level in itertools.product(sizes, fitting.levels())]


def test_of_all_ways_that_fit_it_is_the_fastest(fitting: Fitting) -> None:
    ways = every_way(fitting)
    peaks = sorted(way.peak_bytes for way in ways)
    assert fitting.fastest(peaks[-1]).options == ()
    for limit in peaks[:: len(peaks) // 3]:
        found = fitting.fastest(limit)
        assert found.peak_bytes <= limit
        best = min(way.seconds for way in ways if way.peak_bytes <= limit)
        # a hundredth is not worth a look, nor more computing; a mixture may be faster than any
        assert found.seconds <= 1.021 * best
    assert fitting.fastest(peaks[0] - 1) is None
    assert fitting.least().peak_bytes == peaks[0]


def test_what_is_told_is_what_a_step_takes(fitting: Fitting) -> None:
    peaks = sorted(way.peak_bytes for way in every_way(fitting))
    found = fitting.fastest(peaks[len(peaks) // 3])
    assert found.recompute, "a card whose host decides computes again rather than in parts"
    blocks = blocks_by(tiny_vit(), found.recompute)
    how = {"micro_batch": found.micro_batch, "recompute": blocks, **HOW}
    estimate = estimate_memory(tiny_vit(), (BATCH, *SHAPE), **how)
    assert estimate.peak_bytes == found.peak_bytes
    assert found.options[-2:] == ("--recompute", found.recompute)


def test_where_arithmetic_decides_nothing_is_computed_again() -> None:
    fitting = Fitting(tiny_vit(), SHAPE, BATCH, card=SLOW, captured=True, **HOW)
    whole = fitting.fastest(2**40)
    found = fitting.fastest(whole.peak_bytes - 1)
    assert (found.recompute, found.parts) == ("", 2)
    assert found.options == ("--micro-batch", "3")
    assert found.seconds == pytest.approx(whole.seconds, rel=0.05)
    estimate = estimate_memory(tiny_vit(), (BATCH, *SHAPE), micro_batch=3, **HOW)
    assert estimate.peak_bytes == found.peak_bytes


def test_some_blocks_alone_are_computed_again() -> None:
    model = tiny_vit(depth=3)
    fitting = Fitting(model, SHAPE, 4, card=CARDS["H100"], **HOW)
    nothing, mlp = (fitting._way(4, level).peak_bytes for level in ("", "mlp"))
    limit = (2 * mlp + nothing) // 3
    found = fitting._mixed(4, "", "mlp", limit)
    assert found.recompute == "mlp@0-1"
    assert mlp <= found.peak_bytes <= limit < nothing
    assert fitting._mixed(4, "", "mlp", mlp - 1) is None


def test_models_without_blocks_or_with_an_mlp_alone() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 5))
    fitting = Fitting(plain, SHAPE, BATCH, device="cpu")
    assert fitting.levels() == [""]
    assert fitting.fastest(2**40).parts == 1
    convnext = Fitting(tiny_convnext(), (3, 32, 32), 4, method="linear")
    assert set(convnext.levels()) <= {"", "mlp", "block"}


def test_a_norm_that_refuses_one_image() -> None:
    widened = [nn.Unflatten(1, (8, 1)), nn.Linear(1, 256), nn.GELU(), nn.Linear(256, 1)]
    model = nn.Sequential(nn.BatchNorm1d(8), *widened, nn.Flatten())

    def peak_of(batch: int, images: int) -> int:
        estimate = estimate_memory(model, (batch, 8), micro_batch=images, device="cpu")
        return estimate.peak_bytes

    for batch, sizes in ((8, [8, 2]), (5, [5, 3]), (3, [3])):  # in twos, 5 and 3 leave one over
        fitting = Fitting(model, (8,), batch, device="cpu")
        assert [way.micro_batch for way in fitting.ways()] == sizes
        least = peak_of(batch, sizes[-1])
        assert (fitting.least().micro_batch, fitting.least().peak_bytes) == (sizes[-1], least)
        assert fitting.fastest(least).micro_batch == sizes[-1]
        assert fitting.fastest(least - 1) is None
    with pytest.raises(ValueError, match=r"cannot take \(1, 8\).*more than 1 value per channel"):
        Fitting(model, (8,), 1, device="cpu").least()


def test_parts_take_more_where_gradients_are_most() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 5))
    fitting = Fitting(model, (64,), 4, device="cpu")
    whole, single = (fitting._way(images, "").peak_bytes for images in (4, 1))
    assert whole < single
    assert (fitting.least().parts, fitting.least().peak_bytes) == (1, whole)
    assert fitting.fastest(whole - 1) is None


@pytest.mark.parametrize("batch", [0, -1, True, 2.0])
def test_a_batch_that_is_none(batch: object) -> None:
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1"):
        Fitting(tiny_vit(), SHAPE, batch)


def test_the_picture(fitting: Fitting) -> None:
    ways = list(fitting.ways())
    best = undominated(ways)
    for way in ways:
        assert any(b.seconds <= way.seconds and b.peak_bytes <= way.peak_bytes for b in best)
    for one, other in itertools.pairwise(best):
        assert one.seconds < other.seconds
        assert one.peak_bytes > other.peak_bytes
    figure = frontier_figure({"spt": ways, "again": ways}, best[0].peak_bytes, title="title")
    [axes] = figure.axes
    assert [line.get_label() for line in axes.get_lines()[:2]] == ["spt", "again"]
    assert min(axes.get_lines()[0].get_ydata()) == 1.0
    assert axes.yaxis.get_major_formatter()(1024, None) == "1,024"
    with pytest.raises(ValueError, match="ways must hold"):
        frontier_figure({})

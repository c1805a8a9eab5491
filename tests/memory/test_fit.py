"""The largest batch that fits, against a plain walk over all batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.memory import PeakByBatch, estimate_memory, largest_batch
from spt_kernels.memory.fit import last_below
from tests.models import tiny_convnext, tiny_swin, tiny_vit

SHAPE = (3, 16, 16)


def line(batch: int) -> int:
    return 1000 + 37 * batch


def bent(batch: int) -> int:
    """Weights outweigh everything at first: a flat start, then two slopes."""
    return max(5000 + batch, 700 + 90 * batch, -20_000 + 200 * batch)


def stairs(batch: int) -> int:
    return 1000 + 512 * -(-batch // 7)


def jump(batch: int) -> int:
    """Another kernel is chosen from 100 images on, which needs less, and from 300 on, much more."""
    return 50 * batch + (20_000 if batch < 100 else 15_000) + (200_000 if batch >= 300 else 0)


def fading(batch: int) -> int:
    return int(10_000 * batch**0.5)


def walk(curve: Callable[[int], int], limit: int) -> int:
    return next(batch for batch in itertools.count() if curve(batch + 1) > limit)


CURVES = (line, bent, stairs, jump, fading)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.__name__)
@pytest.mark.parametrize("start", [(), (1,), (64,), (3, 500)], ids=str)
def test_the_last_batch_below_a_limit(curve: Callable[[int], int], start: tuple[int, ...]) -> None:
    for limit in [*range(500, 40_000, 613), 300_000]:
        asked: list[int] = []

        def peak_of(batch: int, asked: list[int] = asked) -> int:
            asked.append(batch)
            return curve(batch)

        low, high = last_below(peak_of, limit, {batch: curve(batch) for batch in start})
        if low == 0:
            assert high == 1
            assert curve(1) > limit
        else:
            assert curve(low) <= limit < curve(low + 1)
            assert high == low + 1
        if curve is not jump:  # which passes some limits twice
            assert low == walk(curve, limit)
        assert len(asked) == len(set(asked)), "nothing is asked twice"
        assert len(asked) <= (5 if curve is line else 26), (limit, asked)


def test_what_is_known_is_not_asked_again() -> None:
    def never(_: int) -> int:
        raise AssertionError("asked")

    assert last_below(never, 100, {7: 99, 8: 101}) == (7, 8)
    assert last_below(never, 100, {1: 101}) == (0, 1)


@pytest.mark.parametrize(
    ("make", "size", "how"),
    [
        (tiny_vit, 16, {"method": "spt-lora", "budget": 900, "rank": 1, "checkpointing": True}),
        (tiny_convnext, 32, {"method": "linear", "dtype": "bf16-autocast"}),
        (tiny_swin, 32, {"training": False}),
    ],
    ids=["vit-spt", "convnext-linear", "swin-inference"],
)
def test_one_more_does_not_fit(make, size: int, how: dict) -> None:
    model, shape = make(), (3, size, size)
    limit = int(1.3 * estimate_memory(model, (40, *shape), **how).peak_bytes)
    found = largest_batch(model, shape, limit, **how)
    # estimates of their own, not those of the search
    assert found.estimate == estimate_memory(model, (found.batch, *shape), **how)
    assert found.beyond == estimate_memory(model, (found.batch + 1, *shape), **how)
    assert found.estimate.peak_bytes <= limit < found.beyond.peak_bytes
    assert found.batch > 40
    assert found
    assert found.limit_bytes == limit


def test_estimates_do_not_depend_on_those_before_them() -> None:
    by_batch = PeakByBatch(tiny_vit(), SHAPE, method="full")
    for batch in (50, 3):
        alone = estimate_memory(tiny_vit(), (batch, *SHAPE), method="full")
        assert by_batch.at(batch) == alone


def test_a_plan_and_a_tuned_model() -> None:
    model = tiny_vit()
    plan = spt.allocate(spt_scores(model), 300, None)
    limit = 2 * 2**20
    by_plan = largest_batch(model, SHAPE, limit, plan)
    assert by_plan == largest_batch(spt.apply(model, plan), SHAPE, limit)
    assert by_plan.estimate.method == "spt-unstructured"


def spt_scores(model: nn.Module) -> spt.Sensitivity:
    named = {n: p.detach().abs() for n, p in model.named_parameters() if n.startswith("blocks.")}
    return spt.Sensitivity.from_tensors(named, 1, head=("head.weight", "head.bias"))


def test_not_even_one() -> None:
    found = largest_batch(tiny_vit(), SHAPE, 2**16, method="full")
    assert found.batch == 0
    assert not found
    assert found.estimate == found.beyond == estimate_memory(tiny_vit(), (1, *SHAPE), method="full")
    assert found.estimate.peak_bytes > 2**16


def test_a_norm_that_refuses_one_image() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 5))
    two, three = (estimate_memory(model, (n, 8), device="cpu").peak_bytes for n in (2, 3))
    assert largest_batch(model, (8,), two, device="cpu").batch == 2
    found = largest_batch(model, (8,), two - 1, device="cpu")
    assert (found.batch, found.estimate.batch_shape) == (0, (2, 8))
    assert largest_batch(model, (8,), three, device="cpu").batch == 3


def test_a_reserve_is_taken_off() -> None:
    model, limit = tiny_vit(), 3 * 2**20
    less = largest_batch(model, SHAPE, limit, reserve_bytes=2**20, method="full")
    assert less.limit_bytes == 2 * 2**20
    assert less == largest_batch(model, SHAPE, 2 * 2**20, method="full")
    assert less.batch < largest_batch(model, SHAPE, limit, method="full").batch


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"limit_bytes": "24"}, TypeError, "limit_bytes must be a number of bytes, got '24'"),
        ({"limit_bytes": 0}, ValueError, "limit_bytes must leave at least 1 byte"),
        ({"limit_bytes": float("nan")}, ValueError, "limit_bytes must leave"),
        ({"reserve_bytes": 2**20}, ValueError, "beside reserve_bytes, got 1048576 and 1048576"),
        ({"reserve_bytes": -1}, ValueError, "reserve_bytes must be at least 0, got -1"),
        (
            {"image_shape": 224},
            TypeError,
            "image_shape must be a sequence of whole numbers, or a mapping to tensors, got 224",
        ),
        (
            {"image_shape": (3, 0, 16)},
            ValueError,
            r"image_shape must hold sizes.* got \(3, 0, 16\)",
        ),
        ({"image_shape": ()}, ValueError, r"image_shape must hold sizes of at least 1, got \(\)"),
        ({"image_shape": {"image": 3}}, TypeError, "image_shape: expected tensors by name"),
        ({"image_shape": (3, 15, 15)}, ValueError, "VisionTransformer cannot take"),
        ({"method": "prompt"}, ValueError, "method: expected one of"),
        ({"optimiser": "sgd"}, TypeError, "optimiser: unexpected, .*; did you mean optimizer"),
    ],
    ids=[
        "text",
        "nothing",
        "nan",
        "all-reserved",
        "negative",
        "side",
        "empty-side",
        "no-side",
        "mapping",
        "image",
        "method",
        "unknown",
    ],
)
def test_bad_arguments(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        largest_batch(
            **{"model": tiny_vit(), "image_shape": SHAPE, "limit_bytes": 2**20} | arguments
        )


def test_public_name_and_a_model_without_data() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2)
    found = spt.largest_batch(model, (3, 224, 224), 0.5 * 2**30, method="spt-unstructured")
    assert isinstance(found, spt.LargestBatch)
    assert found.batch > 1


def total(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()


def test_a_batch_by_hand() -> None:
    # the peak of inference: the weight, and the batch beside the output
    model = nn.Linear(100, 300, bias=False)
    limit = 4 * 100 * 300 + 4 * 400 * 1234
    assert largest_batch(model, (100,), limit, training=False, device="cpu").batch == 1234
    assert largest_batch(model, (100,), limit - 1, training=False, device="cpu").batch == 1233


def test_a_tuned_model_on_meta_is_refused() -> None:
    linear = spt.SparseDeltaLinear(nn.Linear(8, 8), torch.tensor([1, 9]))
    with pytest.raises(ValueError, match="the model is tuned and on the meta device"):
        estimate_memory(nn.Sequential(linear).to("meta"), (4, 8), loss_fn=total)

"""The memory of a step over quantized weights, and what is tunable in such a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from bench.quantizers import QUANTIZERS
from spt_kernels.memory.twin import tensors_of
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_batch, tiny_vit
from tests.packed import quantizer as pack
from tests.quantized import RowScaled, quantize

from .traced import traced_peak

__all__ = ["pack"]

SHAPE = (16, 3, 16, 16)


def make() -> nn.Module:
    return tiny_vit(width=96, depth=1)


def tuned(model: nn.Module, structured: str | None = "lora") -> nn.Module:
    options: dict[str, Any] = {} if structured is None else {"rank": 2, "dropout": 0.0}
    plan = spt.allocate(skewed_sensitivity(model), 1500, structured, **options)
    return spt.apply(model, plan).train()


def sparse(model: nn.Module) -> torch.optim.Optimizer:
    return spt.SparseAdamW(spt.param_groups(model))


def own_bytes(tensors: list[Tensor]) -> int:
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def peak_of_a_step(
    model: nn.Module, folder: Path, shape: tuple[int, ...] = SHAPE, *, autocast: bool = False
) -> int:
    """What lasts between steps, and what the allocator was seen to do in one."""
    optimizer = sparse(model)
    images, labels = torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    run()
    model.zero_grad(set_to_none=True)
    state = [t for own in optimizer.state.values() for t in own.values()]
    lasting = own_bytes([*tensors_of(model), images, labels, *state])
    return traced_peak(run, lasting, folder)


def accounted(model: nn.Module, batch: int = SHAPE[0], **how: Any) -> spt.MemoryEstimate:
    shape = (batch, *SHAPE[1:])
    return spt.estimate_memory(model, shape, device="cpu", optimizer=sparse, **how)


def check_against_the_allocator(model: nn.Module, folder: Path, batch: int, dtype: str) -> None:
    estimate = accounted(model, batch, dtype=dtype)
    shape, is_cast = (batch, *SHAPE[1:]), dtype == "bf16-autocast"
    real = peak_of_a_step(model, folder, shape, autocast=is_cast)
    assert estimate.peak_bytes == pytest.approx(real, rel=0.03)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("structured", "batch", "dtype"),
    [
        ("lora", 16, "fp32"),
        ("lora", 2, "bf16-autocast"),
        ("adapter", 16, "bf16-autocast"),
        (None, 48, "bf16-autocast"),
    ],
)
def test_the_peak_is_what_the_allocator_saw(
    structured: str | None, batch: int, dtype: str, tmp_path: Path
) -> None:
    check_against_the_allocator(tuned(quantize(make()), structured), tmp_path, batch, dtype)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    ("batch", "dtype"), [(2, "fp32"), (2, "bf16-autocast"), (48, "bf16-autocast")]
)
def test_the_peak_of_four_bits(batch: int, dtype: str, pack: Any, tmp_path: Path) -> None:
    check_against_the_allocator(tuned(pack(make())), tmp_path, batch, dtype)


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_the_peak_of_the_quantizers(name: str, tmp_path: Path) -> None:
    if name not in QUANTIZERS:
        pytest.skip(f"what quantizes to {name} is not installed")
    for batch in (2, 48):
        model = tuned(QUANTIZERS[name](make()))
        check_against_the_allocator(model, tmp_path, batch, "bf16-autocast")


def test_under_autocast_no_more_activations_are_kept_than_of_floats(pack: Any) -> None:
    kept = [
        accounted(tuned(model), dtype="bf16-autocast").by_category["activations"]
        for model in (quantize(make()), pack(make()), make())
    ]
    assert max(kept[:2]) <= kept[2]


def test_weights_count_as_they_are_stored() -> None:
    floats, model = accounted(tuned(make())), accounted(tuned(quantize(make())))
    matrices = [m.weight for m in quantize(make()).modules() if isinstance(m, nn.Linear)]
    inner = [w for w in matrices if isinstance(w.data, RowScaled)]
    saved = sum(4 * w.numel() - w.levels.nbytes - w.scale.nbytes for w in inner)
    # and there are no base values beside them
    deltas = [m for n, m in tuned(make()).named_modules() if hasattr(m, "index")]
    nnz = sum(int(m.index.numel()) for m in deltas)  # type: ignore[union-attr,operator]
    assert (
        saved <= floats.by_category["weights"] - model.by_category["weights"] <= (saved + 4 * nnz)
    )


def test_no_float_copies_are_kept_of_tuned_layers() -> None:
    model = quantize(make())
    by_hand = copy.deepcopy(model)
    by_hand.requires_grad_(False)
    for name, parameter in by_hand.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    numel = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    kept = accounted(by_hand).by_category["activations"]
    assert kept - accounted(tuned(model)).by_category["activations"] > 2 * numel  # of 4 bytes each


def test_a_plan_is_rehearsed_and_the_model_left_alone() -> None:
    model = quantize(make())
    plan = spt.allocate(skewed_sensitivity(model), 1500, "lora", rank=2, dropout=0.0)
    weight = model.blocks[0].mlp.fc1.weight
    planned = accounted(model, plan=plan)
    assert planned.peak_bytes == accounted(tuned(quantize(make()))).peak_bytes
    assert model.blocks[0].mlp.fc1.weight is weight
    assert isinstance(weight.data, RowScaled)
    assert planned.backbone_numel == accounted(make(), plan=plan).backbone_numel


def test_what_is_tunable() -> None:
    model = quantize(tiny_vit())
    model.extra = nn.Embedding(3, 4)
    model.extra.weight = nn.Parameter(RowScaled.of(model.extra.weight), requires_grad=False)
    shares = {share.kind: share for share in spt.tunable_parts(model, (3, 16, 16))}
    linears = shares["quantized Linear"]
    assert (linears.tensors, linears.measured) == (8, "in batches")
    assert linears.takes == "LoRA, Adapter, entries"
    assert "Linear" not in shares
    assert shares["quantized, of no Linear"].takes == "nothing"
    assert (
        sum(s.numel for s in shares.values())
        == sum(s.numel for s in spt.tunable_parts(tiny_vit(), (3, 16, 16))) + 12
    )
    assert isinstance(model.blocks[0].mlp.fc1.weight.data, RowScaled)
    found = spt.measure_sensitivity(model, [tiny_batch(2)], progress=False)
    assert found.fallback == ()

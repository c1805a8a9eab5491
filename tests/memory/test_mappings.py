"""Memory of steps on batches that are mappings, as transformers' models take them."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.fitting import Fitting, allocate_within
from spt_kernels.memory.twin import tensors_of
from spt_kernels.sensitivity import skewed_sensitivity
from tests.mappings import of_logits, reader, sentences

from .traced import traced_peak


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def peak_of_a_step(model: nn.Module, batch: dict[str, Tensor], loss_fn: Any, folder: Path) -> int:
    optimizer = adamw(model)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        if loss_fn is None:
            loss = model(**batch)["loss"]
        else:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            output = model(**inputs)
            loss = loss_fn(output, batch["labels"])
        loss.backward()
        optimizer.step()

    run()
    model.zero_grad(set_to_none=True)
    state = [t for own in optimizer.state.values() for t in own.values()]
    every = [*tensors_of(model), *batch.values(), *state]
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in every)}
    return traced_peak(run, sum(storages.values()), folder)


@pytest.mark.parametrize("loss_fn", [None, of_logits], ids=["own loss", "loss_fn"])
def test_the_peak_is_what_the_allocator_saw(loss_fn: Any, tmp_path: Path) -> None:
    model, batch = reader(), sentences(32, 40)
    plan = spt.allocate(skewed_sensitivity(model), 200, "lora", rank=1, dropout=0.0)
    spt.apply(model, plan)
    accounted = spt.estimate_memory(
        model, UserDict(batch), loss_fn=loss_fn, optimizer=adamw, device="cpu"
    )
    real = peak_of_a_step(model, batch, loss_fn, tmp_path)
    assert accounted.peak_bytes == pytest.approx(real, rel=0.02)
    assert accounted.batch_shape == (32, 40)


def test_of_a_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.language_models import sentences as long_sentences
    from tests.language_models import tiny_llama

    model, batch = tiny_llama().train(), long_sentences()
    batch = {name: tensor.repeat(8, 1) for name, tensor in batch.items()}
    accounted = spt.estimate_memory(model, batch, optimizer=adamw, device="cpu")
    real = peak_of_a_step(model, batch, None, tmp_path)
    assert accounted.peak_bytes == pytest.approx(real, rel=0.05)


def test_what_is_computed_again_is_chosen_for_a_mapping() -> None:
    pytest.importorskip("transformers")
    from tests.language_models import sentences as long_sentences
    from tests.language_models import tiny_llama

    model, batch = tiny_llama().train(), long_sentences(32)
    with pytest.raises(RuntimeError, match=r"layers\.0.* cache .* DynamicCache.*use_cache=False"):
        spt.recompute(model, memory_bytes=2**20, batch_shape=batch)
    model.config.use_cache = False
    limit = int(0.8 * spt.estimate_memory(model, batch).peak_bytes)
    assert spt.recompute(model, memory_bytes=limit, batch_shape=batch)
    assert spt.estimate_memory(model, batch).peak_bytes <= limit


@pytest.mark.parametrize("loss_fn", [None, of_logits], ids=["own loss", "loss_fn"])
@pytest.mark.parametrize("given", [1, 7])
def test_the_largest_batch_is_of_samples_like_those_of_a_mapping(loss_fn: Any, given: int) -> None:
    model, how = reader(), {"loss_fn": loss_fn, "dtype": "bf16-autocast"}
    limit = spt.estimate_memory(model, sentences(40), **how).peak_bytes
    found = spt.largest_batch(model, sentences(given), limit, **how)
    assert found.batch >= 40
    assert found.estimate == spt.estimate_memory(model, sentences(found.batch), **how)
    assert found.beyond == spt.estimate_memory(model, sentences(found.batch + 1), **how)
    assert found.estimate.peak_bytes <= limit < found.beyond.peak_bytes


def test_the_fastest_way_that_fits_and_the_best_plan_of_a_mapping() -> None:
    pytest.importorskip("transformers")
    from tests.language_models import sentences as long_sentences
    from tests.language_models import tiny_llama

    model = tiny_llama().train()
    model.config.use_cache = False
    fitting = Fitting(model, long_sentences(1), 16, method="spt-lora", budget=600, rank=2)
    whole = fitting.fastest(2**40)
    assert whole is not None
    assert whole.micro_batch == 16
    limit = (whole.peak_bytes + fitting.least().peak_bytes) // 2
    way = fitting.fastest(limit)
    assert way is not None
    assert way.peak_bytes <= limit < whole.peak_bytes
    scores = skewed_sensitivity(model)
    plan = allocate_within(model, scores, 600, 2**30, long_sentences(16), rank=2).plan
    assert 0 < plan.num_trainable <= 600


def test_only_shapes_are_read() -> None:
    model, batch = reader(), sentences()
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    for how in ({}, {"training": False}, {"dtype": "bf16-autocast"}, {"dtype": "bf16"}):
        found = [spt.estimate_memory(model, given, **how) for given in (batch, meta)]  # type: ignore[arg-type]
        assert found[0] == found[1]
    smaller = spt.estimate_memory(model, sentences(2))
    assert smaller.peak_bytes < spt.estimate_memory(model, meta).peak_bytes


def test_a_method_by_name_has_made_up_scores() -> None:
    model = reader()
    for loss_fn in (None, of_logits):
        batch = sentences()
        found = spt.estimate_memory(
            model, batch, method="spt-lora", budget=150, rank=1, loss_fn=loss_fn
        )
        assert found.made_up_scores
        assert 0 < found.trained <= 150
    assert not hasattr(model, "spt_tuning")


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"labels": None}, TypeError, "expected tensors by name, .* got NoneType under 'labels'"),
        ({3: torch.ones(4)}, TypeError, "got Tensor under 3"),
        ({"labels": torch.ones(3)}, ValueError, r"\['labels'\]: expected 4 rows, .* \(3,\)"),
        ({"labels": torch.ones(())}, ValueError, r"expected 4 rows, one for each sample"),
        ({"typo": torch.ones(4)}, ValueError, r"Reader cannot take .*typo \(4,\)"),
    ],
)
def test_batches_that_cannot_be(changed: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"batch_shape.*{message}"):
        spt.estimate_memory(reader(), {**sentences(), **changed})


def test_a_loss_that_is_not_there() -> None:
    unlabelled = {name: t for name, t in sentences().items() if name != "labels"}
    with pytest.raises(ValueError, match="batch_shape: expected 'labels' for loss_fn, got"):
        spt.estimate_memory(reader(), unlabelled, loss_fn=of_logits)
    with pytest.raises(ValueError, match=r"batch_shape: .* put labels into the batch, or give"):
        spt.estimate_memory(reader(), unlabelled)
    without = spt.estimate_memory(reader(), unlabelled, training=False)
    given = spt.estimate_memory(reader(), sentences(), training=False, loss_fn=of_logits)
    assert 0 < without.peak_bytes <= given.peak_bytes
    with pytest.raises(ValueError, match="batch_shape: expected tensors by name, got none"):
        spt.estimate_memory(reader(), {})

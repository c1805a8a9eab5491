"""Steps on batches that are mappings, as transformers' models take them, captured and not."""

from __future__ import annotations

import copy
import re
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spt_kernels as spt
from spt_kernels.step import TrainingStep, capture_step
from tests.card.pretend import pretended_card
from tests.mappings import N_WORDS, of_logits, reader, sentences

from .runs import adamw

Batch = dict[str, Tensor]


@pytest.fixture
def card() -> Iterator[None]:
    with pretended_card():
        yield


def on_card(batch: Batch) -> Batch:
    return {name: tensor.to("cuda") for name, tensor in batch.items()}


def train_by_hand(
    model: nn.Module, data: list[Batch], loss_fn: Any, accumulate: int = 1
) -> tuple[list[Tensor], nn.Module]:
    model = copy.deepcopy(model)
    optimizer, losses = adamw(model), []
    device = data[0]["labels"].device
    for group in optimizer.param_groups:  # the same arithmetic in both
        group["lr"] = torch.tensor(group["lr"], device=device)
    for n, batch in enumerate(data):
        if loss_fn is None:
            loss = model(**batch)["loss"]
        else:
            given = {name: tensor for name, tensor in batch.items() if name != "labels"}
            loss = loss_fn(model(**given), batch["labels"])
        (loss if accumulate == 1 else loss / accumulate).backward()
        losses.append(loss.detach())
        if (n + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, model


def assert_same(losses: list[Tensor], model: nn.Module, truth: Any) -> None:
    for own, expected in zip(losses, truth[0], strict=True):
        assert torch.equal(own.cpu(), expected.cpu())
    for own, expected in zip(model.parameters(), truth[1].parameters(), strict=True):
        assert torch.equal(own.cpu(), expected.cpu())
    assert len({float(loss.cpu()) for loss in losses}) == len(losses)


@pytest.mark.parametrize("loss_fn", [None, of_logits], ids=["own loss", "loss_fn"])
def test_an_ordinary_step_is_the_loop(loss_fn: Any) -> None:
    model, data = reader(), [sentences(seed=n) for n in range(3)]
    truth = train_by_hand(model, data, loss_fn)
    step = TrainingStep(model, loss_fn, adamw(model))
    assert_same([step(**batch) for batch in data], model, truth)


def test_parts_of_a_batch_add_up_to_it() -> None:
    grads = []
    for most in (None, 2):
        model = reader()
        step = TrainingStep(model, None, adamw(model), micro_batch=most)
        loss = step.backward(**sentences(5))
        grads.append([loss, *(p.grad for p in model.parameters())])
    for whole, parted in zip(*grads, strict=True):
        assert whole is not None
        torch.testing.assert_close(whole, parted)


def words_to_learn(**batch: Tensor) -> Tensor:
    return (batch["labels"] != -100).sum()


def texts_of_many_lengths() -> Batch:
    """Five texts, of which the third and fourth, a part of two, have nothing to learn."""
    batch = sentences(5, length=7)
    labels = batch["input_ids"].clone()
    for text, learned in enumerate((7, 2, 0, 0, 1)):
        labels[text, learned:] = -100
    return {**batch, "labels": labels}


class Tagger(nn.Module):
    """A word's label from the word: the mean over what has one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.score = nn.Embedding(N_WORDS, 8), nn.Linear(8, N_WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        logits = self.score(self.words(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_parts_are_weighed_by_their_words() -> None:
    torch.manual_seed(0)
    model, batch = Tagger(), texts_of_many_lengths()
    grads: dict[str, list[Tensor]] = {}
    for name, how in {
        "whole": {},
        "by words": {"micro_batch": 2, "weigh": words_to_learn},
        "by texts": {"micro_batch": 3},
    }.items():
        model.zero_grad()
        loss = TrainingStep(model, None, adamw(model), **how).backward(**batch)
        grads[name] = [loss, *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
    for whole, by_words, by_texts in zip(*grads.values(), strict=True):
        torch.testing.assert_close(by_words, whole)
        assert not torch.allclose(by_texts, whole, rtol=1e-2)


def test_parts_of_a_batch_in_order_are_weighed() -> None:
    torch.manual_seed(0)
    model, words = nn.Linear(3, 2), torch.tensor([0, 1, -100, -100, -100, 1])
    x = torch.randn(6, 3)
    step = TrainingStep(
        model, F.cross_entropy, adamw(model), micro_batch=2, weigh=lambda _, y: int((y >= 0).sum())
    )
    torch.testing.assert_close(step.backward(x, words), F.cross_entropy(model(x), words).detach())


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(weight: float) -> None:
    model = reader()
    step = TrainingStep(model, None, adamw(model), micro_batch=2, weigh=lambda **_: weight)
    with pytest.raises(ValueError, match=r"weigh: expected of each part how many things"):
        step.backward(**sentences(5))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("loss_fn", [None, of_logits], ids=["own loss", "loss_fn"])
def test_captured_it_is_the_loop(loss_fn: Any, accumulate: int) -> None:
    model = reader().to("cuda")
    data = [on_card(sentences(seed=n)) for n in range(4)]
    truth = train_by_hand(model, data, loss_fn, accumulate)
    given = UserDict(data[0])  # as the batches of a tokenizer
    step = capture_step(model, loss_fn, adamw(model), given, accumulate=accumulate)  # type: ignore[arg-type]
    # by name, in whatever order
    losses = [step(**dict(reversed(batch.items()))) for batch in data]
    assert_same(losses, model, truth)


@pytest.mark.usefixtures("card")
def test_a_ragged_batch_is_computed_eagerly() -> None:
    model = reader().to("cuda")
    data = [on_card(sentences(n, seed=n)) for n in (4, 4, 3, 4)]
    truth = train_by_hand(model, data, None)
    step = capture_step(model, None, adamw(model), data[0], ragged="eager")
    assert_same([step(**batch) for batch in data], model, truth)


@pytest.mark.usefixtures("card")
def test_a_tuned_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from spt_kernels.sensitivity import skewed_sensitivity

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=36, image_size=8, patch_size=4, num_labels=3
    )
    plain = transformers.ViTForImageClassification(config)
    scores = skewed_sensitivity(plain)
    model = spt.apply(plain.to("cuda"), spt.allocate(scores, 200, "lora", rank=1, dropout=0.0))
    model.train()
    images = [
        {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 2, 1, 1])}
        for _ in range(2)
    ]
    data = [on_card(batch) for batch in images]
    truth = train_by_hand(model, data, None)
    step = capture_step(model, None, adamw(model), data[0])
    assert_same([step(**batch) for batch in data], model, truth)


@pytest.mark.usefixtures("card")
def test_batches_that_are_others_than_the_captured() -> None:
    model, batch = reader().to("cuda"), on_card(sentences())
    step = capture_step(model, None, adamw(model), batch)
    named = "expected attention_mask, input_ids, labels by name, as in step(**batch), got"
    with pytest.raises(TypeError, match=re.escape(f"{named} 3 tensors")):
        step(*batch.values())
    with pytest.raises(TypeError, match=re.escape(f"{named} labels")):
        step(labels=batch["labels"])
    with pytest.raises(ValueError, match=r"batch\['input_ids'\]: expected int64 \[4, 6\] on cuda"):
        step(**{**batch, "input_ids": batch["input_ids"].float()})
    with pytest.raises(ValueError, match="captured with 4 samples, got 3"):
        step(**on_card(sentences(3)))
    assert torch.isfinite(step(**batch).cpu())


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("loss_fn", "changed", "kind", "message"),
    [
        (None, {"labels": None}, TypeError, "got NoneType under 'labels'"),
        (None, {"labels": torch.ones(3)}, ValueError, r"batch\['labels'\]: expected 4 rows"),
        (None, {"input_ids": torch.ones(4, 6)}, ValueError, r"expected a tensor on cuda:0, .* cpu"),
        (None, "no labels", ValueError, r"batch: .* put labels into the batch, or give a loss_fn"),
        (of_logits, "no labels", ValueError, "batch: expected 'labels' for loss_fn, got"),
    ],
)
def test_what_cannot_be_captured(
    loss_fn: Any, changed: Any, kind: type[Exception], message: str
) -> None:
    model, batch = reader().to("cuda"), on_card(sentences())
    before = [p.cpu() for p in model.parameters()]
    given: dict[str, Any] = {**batch, **changed} if isinstance(changed, dict) else dict(batch)
    if changed == "no labels":
        del given["labels"]
    with pytest.raises(kind, match=message):
        capture_step(model, loss_fn, adamw(model), given)
    for own, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(own.cpu(), expected)


@pytest.mark.usefixtures("card")
def test_a_batch_of_nothing_trains_nothing() -> None:
    model, batch = reader().to("cuda"), on_card(sentences())
    step = capture_step(model, None, adamw(model), batch, ragged="eager")
    with pytest.raises(ValueError, match="batch: expected samples, got none"):
        step(**{name: tensor[:0] for name, tensor in batch.items()})
    assert torch.isfinite(step(**batch).cpu())


def test_what_cannot_be_parted() -> None:
    model, batch = reader(), sentences()
    step = TrainingStep(model, None, adamw(model), micro_batch=3)
    with pytest.raises(ValueError, match=r"batch\['attention_mask'\]: expected 4 rows"):
        step(**{**batch, "attention_mask": torch.ones(1, 6)})
    with pytest.raises(TypeError, match=r"batch: expected tensors by name, .* bool under 'use_c"):
        step(**batch, use_cache=False)  # type: ignore[arg-type]
    del batch["labels"]
    for most in (3, None):
        step = TrainingStep(model, of_logits, adamw(model), micro_batch=most)
        with pytest.raises(ValueError, match="batch: expected 'labels' for loss_fn, got"):
            step(**batch)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_of_its_own_is_for_mappings() -> None:
    model, batch = reader(), sentences()
    pair = batch["input_ids"], batch["labels"]
    with pytest.raises(TypeError, match="loss_fn: None is for a batch that is a mapping"):
        capture_step(model, None, adamw(model), pair)
    with pytest.raises(TypeError, match="loss_fn: None is for batches by name"):
        TrainingStep(model, None, adamw(model))(*pair)
    step = TrainingStep(model, F.cross_entropy, adamw(model))
    for given, named in (((), {}), (pair, batch)):
        with pytest.raises(TypeError, match=re.escape("as step(images, labels) or as step(**b")):
            step(*given, **named)

"""measure_sensitivity with batches that are mappings, and the loss that a model computes itself."""

from __future__ import annotations

import copy
import logging
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.language_models import IGNORED, sample, sentences, tiny_bert, tiny_gpt2, tiny_llama


def measure(model: nn.Module, batches: Any, *args: Any, **options: Any) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, batches, *args, progress=False, **options)


def alone(model: nn.Module, batches: list[Any], names: Any) -> dict[str, Tensor]:
    """Σ g² by name, each sample by a forward of its own, in float64."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for batch in batches:
        for i in range(len(batch["input_ids"])):
            loss = model(**sample(batch, i))
            loss = loss["loss"] if isinstance(loss, dict) else loss[0]
            if loss.isnan():
                continue
            gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient**2
    return total


def assert_alone(found: spt.Sensitivity, model: nn.Module, batches: list[Any]) -> None:
    truth = alone(model, batches, list(found))
    for name, score in truth.items():
        # k's bias has no gradient but for rounding, softmax being what it is
        torch.testing.assert_close(found[name].double(), score, rtol=1e-4, atol=1e-9, msg=name)


def test_a_sentence_counts_by_the_mean_over_its_own_words() -> None:
    model, batches = tiny_llama(), [sentences(4), sentences(3, seed=2)]
    found = measure(model, batches)
    assert found.num_samples == 7
    assert not found.fallback
    assert_alone(found, model, batches)


def test_a_loss_that_a_model_computes_without_transformers_loss_function() -> None:
    model, batch = tiny_bert(), {**sentences(4), "labels": torch.tensor([0, 2, 1, 1])}
    found = measure(model, [UserDict(batch)])  # as tokenizers give it
    assert not found.fallback
    assert found.head == ("classifier.weight", "classifier.bias")
    assert_alone(found, model, [batch])


def test_transposed_matrices_are_candidates_and_measured_in_batches() -> None:
    model, batch = tiny_gpt2(), sentences(4)
    found = measure(model, [batch])
    assert not found.fallback
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert {f"transformer.h.0.{name}.weight", f"transformer.h.0.{name}.bias"} <= set(found)
    assert_alone(found, model, [batch])


def test_a_batch_of_one() -> None:
    model, batches = tiny_llama(), [sentences(1), sentences(1, seed=2)]
    assert_alone(measure(model, batches), model, batches)


def test_a_loss_of_two_terms_takes_a_forward_for_each_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_bert("answers")
    places = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 2, 3])}
    batch = {"input_ids": sentences(3)["input_ids"], **places}
    with caplog.at_level(logging.WARNING, "spt_kernels"):
        found = measure(model, [batch])
    assert "does not part into its samples" in caplog.text
    assert set(found.fallback) == set(found)
    assert_alone(found, model, [batch])


class TimeFirst(nn.Module):
    """A small model of words whose loss goes through all first words, then all second ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(31, 8)
        self.mix = nn.Linear(8, 8)
        self.last = nn.Linear(8, 31)

    def forward(self, input_ids: Tensor, labels: Tensor, **_unused: Tensor) -> dict[str, Tensor]:
        scores = self.last(self.mix(self.words(input_ids)).relu()).transpose(0, 1)
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.T.flatten())}


def test_a_loss_that_mixes_the_samples_rows_is_noticed() -> None:
    model, batch = TimeFirst(), sentences(4)
    found = measure(model, [batch])
    assert set(found.fallback) == set(found)
    assert_alone(found, model, [batch])


class Balanced(TimeFirst):
    """The same words in order, and to the loss a small term is added in place."""

    def forward(self, input_ids: Tensor, labels: Tensor, **_unused: Tensor) -> dict[str, Tensor]:
        features = self.mix(self.words(input_ids))
        loss = F.cross_entropy(self.last(features.relu()).flatten(0, 1), labels.flatten())
        loss += 1e-5 * features.square().sum()  # as routers of experts have one
        return {"loss": loss}


@pytest.mark.parametrize("n", [1, 3])
def test_a_term_that_is_added_in_place_counts(n: int) -> None:
    model, batch = Balanced(), sentences(n)
    found = measure(model, [batch])
    assert set(found.fallback) == set(found)
    assert_alone(found, model, [batch])


def test_a_sample_without_labels_counts_as_none() -> None:
    first, second = sentences(3), sentences(2, seed=2)
    first["labels"][0] = IGNORED
    found = measure(tiny_llama(), [first, second], num_samples=4)
    assert found.num_samples == 4
    rest = {key: value[1:] for key, value in first.items()}
    assert_alone(found, tiny_llama(), [rest, second])


def test_dropout_does_not_hide_that_samples_part() -> None:
    model = tiny_llama(attention_dropout=0.5)
    assert not measure(model, [sentences(4)], train=True).fallback


def of_next_words(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_function_gets_the_labels_of_a_mapping() -> None:
    model, batch = tiny_llama(), sentences(4)
    theirs, own = measure(model, [batch], of_next_words), measure(model, [batch])
    for name in own:
        torch.testing.assert_close(theirs[name], own[name])
    pair = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    for name, score in measure(model, [pair], of_next_words).items():
        assert torch.equal(score, theirs[name])


class TakesOne(nn.Module):
    """A model that takes all of its input as one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, inputs: dict[str, Tensor], **_options: Any) -> Tensor:
        return self.last(self.first(inputs["x"]).relu())


def test_a_model_that_takes_a_mapping_as_it_is_gets_it_so() -> None:
    x, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    assert measure(TakesOne(), [({"x": x}, labels)]).num_samples == 4


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"input_ids": torch.ones(2, 3, dtype=torch.int64)}], "put labels into the batch"),
        ([sentences(2), (torch.ones(2, 3), torch.ones(2))], "as batch 1"),
    ],
    ids=["no labels", "pairs later"],
)
def test_batches_that_have_no_loss(batches: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(tiny_llama(), batches)


def test_a_loss_for_each_sample_is_no_scalar() -> None:
    class EachAlone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.above(self.below(x))
            return {"loss": F.cross_entropy(logits, labels, reduction="none"), "logits": logits}

    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(ValueError, match=r"'loss' must be a scalar, got one of shape \(2,\)"):
        measure(EachAlone(), [batch])


def test_a_loss_function_needs_labels() -> None:
    batch = sentences(2)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"'labels' in batch 0.*attention_mask"):
        measure(tiny_llama(), [batch], of_next_words)

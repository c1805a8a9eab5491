"""Models and batches that are seldom met: what they get is exact, or an error that says why not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_kernels as spt

LABELS = torch.tensor([0, 1, 2, 3])


def measure(model: nn.Module, inputs: Tensor, labels: Tensor = LABELS) -> spt.Sensitivity:
    batch = [(inputs, labels)]
    return spt.measure_sensitivity(model, batch, include=["*"], head=(), progress=False)


def assert_exact(found: spt.Sensitivity, model: nn.Module, inputs: Tensor) -> None:
    """Against the gradients of each sample alone, from a model and samples of its own."""
    parameters = dict(model.named_parameters())
    truth = {name: torch.zeros(score.shape) for name, score in found.items()}
    for sample, label in zip(inputs.clone().split(1), LABELS.split(1), strict=True):
        loss = F.cross_entropy(copy.copy(model)(sample.clone()), label)
        chosen = [parameters[name] for name in truth]
        gradients = torch.autograd.grad(loss, chosen, allow_unused=True)
        for total, gradient in zip(truth.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.to_dense() ** 2
    for name, score in truth.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-8, msg=name)


class InFrequencies(nn.Module):
    """Real factors of complex numbers, one to a channel, and one that is a factor of reals too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.both = (nn.Parameter(torch.randn(8)) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.fft(x * self.both, dim=1)
        y = torch.addcmul(self.shift.to(y.dtype), y * self.scale, self.both.to(y.dtype))
        return self.head(torch.fft.ifft((1 + 2j) * y, dim=1).real.tanh().mean(1))


def test_real_factors_of_complex_numbers() -> None:
    torch.manual_seed(0)
    model, inputs = InFrequencies(), torch.randn(4, 6, 8)
    assert_exact(measure(model, inputs), model, inputs)


class Whole(nn.Module):
    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.more = nn.Parameter(parameter, requires_grad=parameter.dtype.is_floating_point)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().mean(1) + self.more.sum().real)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_what_is_not_floating_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"more is of {dtype}, and only floating parameters"):
        measure(Whole(torch.ones(3, dtype=dtype)), torch.randn(4, 6, 8))


def test_a_parameter_without_elements_scores_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = Whole(torch.ones(0, 3)), torch.randn(4, 6, 8)
    found = measure(model, inputs)
    assert found["more"].shape == (0, 3)
    assert_exact(found, model, inputs)


class Edits(nn.Module):
    """A forward that writes into its input, as one that subtracts a mean does."""

    def __init__(self, *, of_words: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 8) if of_words else nn.Identity()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.factor = nn.Parameter(torch.randn(8, 8))  # takes a pass of its own

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.head((self.layer(self.words(x)) @ self.factor).tanh().mean(1))


@pytest.mark.parametrize("of_words", [True, False], ids=["words", "floats"])
def test_a_forward_that_edits_its_input_is_given_the_same_each_time(of_words: bool) -> None:
    torch.manual_seed(0)
    model = Edits(of_words=of_words)
    inputs = torch.randint(20, (4, 6)) if of_words else torch.randn(4, 6, 8)
    before = inputs.clone()

    found = measure(model, inputs)

    assert torch.equal(inputs, before)
    assert "factor" in found.fallback
    assert_exact(found, model, inputs)


def test_a_loss_function_that_edits_its_target_is_given_the_same_each_time() -> None:
    def from_one(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target.sub_(1))

    torch.manual_seed(0)
    model, inputs, labels = Edits(of_words=False), torch.randn(4, 6, 8), LABELS + 1
    found = spt.measure_sensitivity(
        model, [(inputs, labels)], from_one, include=["*"], head=(), progress=False
    )
    assert torch.equal(labels, LABELS + 1)
    assert_exact(found, model, inputs)


@pytest.mark.parametrize("classes", [2, 4])
def test_an_output_that_all_samples_share_may_have_as_many_rows(classes: int) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("of_each", torch.randn(classes, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x).tanh(), F.normalize(self.of_each)

    def nearness(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0] @ outputs[1].t(), target)

    torch.manual_seed(0)
    model, inputs, labels = Classes(), torch.randn(4, 8), torch.tensor([1, 0, 1, 1])
    batches = [(inputs, labels), (inputs[:2], labels[:2])]
    for head in (None, ()):
        found = spt.measure_sensitivity(model, batches, nearness, head=head, progress=False)
        truth = torch.zeros(8, 8)
        for sample, label in zip(
            inputs[[0, 1, 2, 3, 0, 1]], labels[[0, 1, 2, 3, 0, 1]], strict=True
        ):
            loss = nearness(model(sample[None]), label[None])
            truth += torch.autograd.grad(loss, model.layer.weight)[0].square()
        torch.testing.assert_close(found["layer.weight"], truth, rtol=1e-4, atol=1e-8)


def test_batches_made_in_inference_mode() -> None:
    torch.manual_seed(0)
    model = Edits(of_words=False)
    with torch.inference_mode():
        inputs, labels = torch.randn(4, 6, 8), LABELS.clone()
    assert_exact(measure(model, inputs, labels), model, inputs)


class Mapped(nn.Module):
    """A part of it is written for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.vmap(lambda own: self.norm(self.layer(own).tanh()).mean(0))(self.first(x))
        return self.head(x)


def test_parts_that_are_mapped_over_samples() -> None:
    torch.manual_seed(0)
    model, inputs = Mapped(), torch.randn(4, 6, 8)
    found = measure(model, inputs)
    assert {name.split(".")[0] for name in found.fallback} == {"layer", "norm"}
    assert_exact(found, model, inputs)


class Bags(nn.Module):
    """Sums of words, whose table gets a sparse gradient and is measured by plain autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(11, 8, mode="sum", sparse=True)
        self.head = nn.Linear(8, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).tanh())


def test_a_table_with_sparse_gradients() -> None:
    torch.manual_seed(0)
    model, words = Bags(), torch.randint(11, (4, 30))  # of which many come twice
    found = measure(model, words)
    assert found.fallback == ("words.weight",)
    assert_exact(found, model, words)

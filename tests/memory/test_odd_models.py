"""Models that forwards have left tensors in or that ask for values, callers in a mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

from spt_kernels import memory
from spt_kernels.memory import made_up_sensitivity
from tests.models import tiny_vit

estimate_memory = functools.partial(memory.estimate_memory, device="cpu")  # to the byte
SHAPE = (2, 3, 16, 16)


class Stashing(nn.Module):
    """Keeps of a forward what comes with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, 5)
        self.aux: Tensor | None = None
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.flatten(1))
        self.aux, self.maps = y.square().mean(), [y]
        return y


def layered(change: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    change(model[1])
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        Stashing,
        lambda: layered(weight_norm),
        lambda: layered(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    ],
    ids=["stashing", "weight-norm", "pruned"],
)
def test_what_a_forward_has_left_is_no_part_of_a_copy(make: Callable[[], nn.Module]) -> None:
    model = make()
    with torch.no_grad():
        model(torch.randn(SHAPE))
    fresh = estimate_memory(model, SHAPE)
    model(torch.randn(SHAPE))
    left: Any = getattr(model, "aux", None)
    estimate = estimate_memory(model, SHAPE)
    assert getattr(model, "aux", None) is left
    trained = sum(p.nbytes for p in model.parameters())
    assert trained <= estimate.by_category["weights"] <= 2 * trained
    assert estimate.peak_bytes <= fresh.peak_bytes


def test_a_plain_tensor_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Stashing()
        model.scale = torch.ones(1024)  # type: ignore[assignment]
    plain = estimate_memory(model, SHAPE).by_category["weights"]
    del model.scale
    assert plain - estimate_memory(model, SHAPE).by_category["weights"] == 4096


def test_the_mode_of_the_caller_is_not_that_of_the_step() -> None:
    model = tiny_vit(depth=1)
    around = torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)
    expected = estimate_memory(model, SHAPE, method="lora-2")
    scores = made_up_sensitivity(model, SHAPE[1:])
    for mode in (*around, torch.device("meta")):
        with mode:
            found = estimate_memory(model, SHAPE, method="lora-2")
            same = made_up_sensitivity(model, SHAPE[1:])
        assert found == expected, mode
        assert found.by_category == expected.by_category
        assert same.keys() == scores.keys()


class Asking(nn.Module):
    """Leaves a layer out now and then, as stochastic depth of speech models does."""

    def __init__(self, ask: Callable[[Tensor], bool | Tensor]) -> None:
        super().__init__()
        self.ask, self.fc = ask, nn.Linear(768, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.flatten(1))
        return y * 2 if self.ask(y) else y


def squared_of_some(output: Tensor, target: Tensor) -> Tensor:
    return output[output > 0].square().mean()


@pytest.mark.parametrize(
    ("model", "loss_fn", "told"),
    [
        (Asking(lambda y: torch.rand(()) < 0.1), None, "model: Asking"),
        (Asking(lambda y: y.isinf().any()), None, "model: Asking"),
        (Asking(lambda y: False), squared_of_some, "loss_fn"),
    ],
    ids=["random", "infinite", "loss"],
)
def test_values_that_are_asked_for(model: nn.Module, loss_fn: Any, told: str, caplog) -> None:
    with pytest.raises(ValueError, match=rf"{told} goes by the values of a tensor \(test_odd"):
        estimate_memory(model, SHAPE, loss_fn=loss_fn)
    assert not caplog.records


def test_an_output_without_scores_and_weights_of_16_bits() -> None:
    model = tiny_vit(depth=1)
    head, model.head = model.head, nn.Identity()
    model.register_forward_hook(lambda module, args, output: {"logits": head(output)})
    with pytest.raises(ValueError, match=r"loss_fn: VisionTransformer gives a dict and no tensor"):
        estimate_memory(model, SHAPE)
    with pytest.raises(ValueError, match=r"weights are torch\.float16, for which dtype='bf16'"):
        estimate_memory(tiny_vit(depth=1).half(), SHAPE)


class Compiled(nn.Module):
    """A module as `torch.compile` makes it of another one, which runs on no fakes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_a_compiled_model_is_accounted_for_as_it_was_and_a_traced_one_refused() -> None:
    plain = estimate_memory(tiny_vit(depth=1), SHAPE, method="lora-2")
    assert estimate_memory(Compiled(tiny_vit(depth=1)), SHAPE, method="lora-2") == plain
    traced = torch.jit.trace(nn.Flatten(), torch.ones(SHAPE))
    with pytest.raises(ValueError, match=r"wrapped in a .*: account for the model itself"):
        estimate_memory(traced, SHAPE)


def test_a_batch_in_place_of_its_shape_is_not_written_out() -> None:
    images = torch.randn(SHAPE)
    for given in (images, (images, torch.zeros(2))):
        with pytest.raises(TypeError, match="batch_shape must be a sequence of whole") as raised:
            estimate_memory(tiny_vit(depth=1), given)  # type: ignore[arg-type]
        assert len(str(raised.value)) < 200

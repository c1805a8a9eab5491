"""Which methods train a model with quantized weights."""

from __future__ import annotations

import pytest

import spt_kernels as spt
from tests.models import tiny_batch, tiny_vit
from tests.quantized import quantize


@pytest.mark.parametrize("method", ["full", "lora-2"])
def test_methods_that_train_weights_or_have_layers_of_their_own_are_refused(method: str) -> None:
    model = quantize(tiny_vit())
    with pytest.raises(
        ValueError, match=f"method: {method} cannot train a quantized model, and bl"
    ):
        spt.methods[method](model)
    with pytest.raises(ValueError, match=f"method: {method} cannot train a quantized model"):
        spt.estimate_memory(model, (2, 3, 16, 16), method=method)


@pytest.mark.parametrize("method", ["bias", "adapter-2"])
def test_methods_whose_plan_is_applied_are_not(method: str) -> None:
    tunable = spt.methods[method](quantize(tiny_vit()))
    tunable.model(tiny_batch(2)[0]).sum().backward()
    trained = [p for p in tunable.model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)

"""What cannot be copied in a model is named, wherever a copy of it is made."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import spt_kernels as spt
from tests.models import tiny_vit


class Cache:
    """What looks up under a lock."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}
        self.lock = threading.Lock()


@pytest.mark.parametrize("value", [Cache(), {"a": [threading.RLock()]}], ids=["object", "dict"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: spt.estimate_memory(model, (2, 3, 16, 16)),
        lambda model: spt.largest_batch(model, (3, 16, 16), 2**30),
        spt.TaskBank,
    ],
    ids=["estimate", "largest", "bank"],
)
def test_an_attribute_that_cannot_be_copied_is_named(use: Any, value: Any) -> None:
    model = tiny_vit(depth=1)
    model.blocks[0].mlp.extra = value
    model.blocks[0].attn.mlp_of = [model.blocks[0].mlp]  # through which it is found as well
    with pytest.raises(ValueError, match=r"^model: blocks\.0\.mlp\.extra cannot be copied \(cann"):
        use(model)


def test_a_class_with_a_way_to_copy_it_will_do() -> None:
    class Shared(Cache):
        def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
            return self

    model: nn.Module = tiny_vit(depth=1)
    model.extra = Shared()  # type: ignore[assignment]
    assert spt.estimate_memory(model, (2, 3, 16, 16)).peak_bytes

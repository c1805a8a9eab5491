"""A whole run on a (pretended) card whose weights, or optimizer state, are on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, Recipe, finetune, pipeline
from spt_kernels.finetuning.run.setting import Setting
from spt_kernels.offloading import blocks_on_host
from tests.finetuning.pictures_on_disk import write_task, write_weights
from tests.finetuning.undrawn import draw_nothing

from .on_card import CARD
from .pretend import pretended_card


@pytest.mark.parametrize(
    ("method", "words"), [("lora-2", "frozen"), ("partial-1", "forward-only,state")]
)
def test_a_run_of_the_same_values(
    method: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_nothing(monkeypatch)
    seen: list[tuple[int, int]] = []
    test = pipeline._test

    def watched(setting: Setting, model: nn.Module, *rest: Any) -> float | None:
        on_card = sum(p.nbytes for p in model.parameters() if p.device == CARD)
        seen.append((on_card, len(blocks_on_host(model))))
        return test(setting, model, *rest)

    monkeypatch.setattr(pipeline, "_test", watched)
    base = write_weights(tmp_path / "base.safetensors")
    images = ImageSource(str(write_task(tmp_path / "data", train=6, test=3)))
    job = FinetuneJob(base, images, Method(method), Recipe(epochs=1, batch_size=8, amp="bf16"))
    results = []
    with pretended_card():
        for name, told in (("plain", None), ("away", words)):
            each = replace(job, recipe=replace(job.recipe, offload=told))
            results.append(finetune(each, tmp_path / name, device="cuda", graph=False))
    file = results[0]["file"]
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "away" / file).read_bytes()
    assert seen[1][0] < seen[0][0], "weights of the card"
    assert (seen[0][1], seen[1][1]) == (0, 2 if words == "frozen" else 1)
    assert not torch.cuda.is_initialized()

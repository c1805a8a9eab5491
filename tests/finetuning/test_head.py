"""A head that is named has the layer that gives the scores, which is known before any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_kernels.finetuning import FinetuneJob, ImageSource, Method, ModelSource, Recipe, finetune

pytestmark = pytest.mark.usefixtures("quickly")

RECIPE = Recipe(epochs=1, batch_size=8)


@pytest.mark.parametrize("method", ["bias", "spt-lora", "adapter-8"])
@pytest.mark.parametrize(
    ("head", "words"), [("norm", "norm, of 24 outputs"), ("blocks.1", r"blocks\.1.*, of 24 or")]
)
def test_a_head_without_the_scores_is_refused_at_once(
    tmp_path: Path, task: ImageSource, base: ModelSource, method: str, head: str, words: str
) -> None:
    job = FinetuneJob(base, task, Method(method, head=(head,)), RECIPE)
    with pytest.raises(
        ValueError, match=f"head: expected .* of the 3 classes among it, got {words}"
    ):
        finetune(job, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_than_the_scores_or_nothing_is_fine(
    tmp_path: Path, task: ImageSource, base: ModelSource
) -> None:
    for head in (("head", "norm"), ()):
        job = FinetuneJob(base, task, Method("bias", head=head), RECIPE)
        result = finetune(job, tmp_path / f"run {len(head)}")
        assert (tmp_path / f"run {len(head)}" / result["file"]).is_file()

"""Lightning trains a tuned model, stops and goes on: what its Trainer does beside our layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import spt_kernels as spt
from spt_kernels.sensitivity import skewed_sensitivity
from tests.models import tiny_vit

lightning = pytest.importorskip("lightning")

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 5


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """A tuned model, as whoever uses Lightning would write it down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = spt.SparseAdamW(spt.param_groups(self.model), lr=1e-2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


def tuned(kind: Any) -> nn.Module:
    model = tiny_vit()
    options = {} if kind is None else {"rank": 1, "dropout": 0.0}  # it restores no random state
    return spt.apply(model, spt.allocate(skewed_sensitivity(model), 1_500, kind, **options))


def trained(model: nn.Module, place: Path, epochs: int, begun: Path | None, **how: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=place,
        **how,
    )
    trainer.fit(Classifier(model), DataLoader(TensorDataset(IMAGES, LABELS), 8), ckpt_path=begun)
    return trainer


@pytest.mark.filterwarnings("ignore")  # of Lightning: a few workers, a few cores
@pytest.mark.parametrize("kind", ["lora", "adapter", None])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    ],
    ids=["fp32", "autocast", "bf16", "clipped and accumulated"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_task(
    kind: Any, how: dict[str, Any], tmp_path: Path
) -> None:
    whole, again = tuned(kind), tuned(kind)
    before = {n: t.clone() for n, t in whole.state_dict().items()}
    trained(whole, tmp_path, 4, None, **how)
    trained(tuned(kind), tmp_path, 2, None, **how).save_checkpoint(tmp_path / "half.ckpt")
    trained(again, tmp_path, 4, tmp_path / "half.ckpt", **how)
    assert any(not torch.equal(t.to(before[n]), before[n]) for n, t in whole.state_dict().items())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    spt.save_delta(whole, tmp_path / "task.safetensors")
    plain = tiny_vit().to(next(whole.parameters()).dtype)
    loaded = spt.load_delta(plain, tmp_path / "task.safetensors").eval()
    images = IMAGES[:4].to(next(whole.parameters()).dtype)
    assert torch.equal(loaded(images), whole.eval()(images))

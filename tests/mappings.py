"""A model of the tests' own that takes mappings and computes its loss, as transformers' do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_WORDS, N_LABELS = 11, 3


class Reader(nn.Module):
    """Sentences to a label: a table of words, an MLP, the mean over what is no padding."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(N_WORDS, width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.score = nn.Linear(width, N_LABELS)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Any]:
        x = self.words(input_ids)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        share = attention_mask / attention_mask.sum(1, keepdim=True)
        logits = self.score((x * share.unsqueeze(-1)).sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def reader(width: int = 24) -> Reader:
    torch.manual_seed(0)
    return Reader(width).train()


def sentences(n: int = 4, length: int = 6, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(N_WORDS, (n, length), generator=generator)
    mask = torch.ones(n, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    labels = torch.randint(N_LABELS, (n,), generator=generator)
    return {"input_ids": words, "attention_mask": mask, "labels": labels}


def of_logits(output: dict[str, Any], labels: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"], labels, label_smoothing=0.1)

"""Tokens that values choose: how many of a sample there are is another matter in each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import spt_kernels as spt

from .per_sample_truth import assert_exact

Pick = Callable[[Tensor, Tensor], Tensor]
Put = Callable[[Tensor, Tensor, Tensor], Tensor]


def places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


def repeated(h: Tensor, mask: Tensor) -> Tensor:
    return torch.arange(mask.numel()).repeat_interleave(mask.flatten().long())


PICKS: dict[str, Pick] = {
    "mask": lambda h, mask: h[mask],
    "nonzero": lambda h, mask: h.flatten(0, 1)[places(mask)],
    "where": lambda h, mask: h[torch.where(mask)],
    "index_select": lambda h, mask: h.flatten(0, 1).index_select(0, places(mask)),
    "masked_select": lambda h, mask: h.masked_select(mask[..., None]).view(-1, 8),
    "joined": lambda h, mask: torch.cat([h[mask][:1], h[mask][1:]]),
    "of_places_of_rows": lambda h, mask: h.flatten(0, 1)[repeated(h, mask)],
}


def in_order(h: Tensor, order: Tensor, mask: Tensor) -> Tensor:
    return h.flatten(0, 1)[order[: int(mask.sum())]]


PICKS |= {
    "argsort": lambda h, mask: in_order(h, (~mask).flatten().int().argsort(stable=True), mask),
    "sort": lambda h, mask: in_order(
        h, mask.view(-1, 1).sort(dim=0, descending=True, stable=True)[1].squeeze(1), mask
    ),
    "topk": lambda h, mask: in_order(
        h, (mask.flatten() / torch.arange(1, mask.numel() + 1)).topk(int(mask.sum()))[1], mask
    ),
}


def by_sample(h: Tensor, mask: Tensor, parts: Iterable[Tensor]) -> Tensor:
    counts = mask.sum(1).tolist()
    return torch.cat([one[:count] for one, count in zip(parts, counts, strict=True)])


PICKS |= {
    "rows": lambda h, mask: by_sample(h, mask, h),
    "unbind": lambda h, mask: by_sample(h, mask, h.unbind()),
    "select": lambda h, mask: by_sample(h, mask, [h.select(0, i) for i in range(len(h))]),
    "split": lambda h, mask: by_sample(h, mask, [one.squeeze(0).tanh() for one in h.split(1)]),
    "numbers": lambda h, mask: torch.cat([h[i, :n] for i, n in enumerate(mask.sum(1).tolist())]),
}


def by_assignment(h: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[mask] = rows
    return y


PUTS: dict[str, Put] = {
    "assignment": by_assignment,
    "index_put": lambda h, mask, rows: h.index_put(torch.where(mask), rows),
    "masked_scatter": lambda h, mask, rows: h.masked_scatter(mask[..., None], rows),
    "index_add": lambda h, mask, rows: h.flatten(0, 1).index_add(0, places(mask), rows).view_as(h),
}


class Picking(nn.Module):
    """A layer on chosen tokens, between one before and one after that see all of them."""

    def __init__(self, pick: Pick, put: Put) -> None:
        super().__init__()
        self.before, self.chosen, self.after = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.pick, self.put = pick, put

    def forward(self, x: Tensor) -> Tensor:
        mask, h = x[..., 0] > 0, self.before(x)
        rows = self.chosen(self.pick(h, mask)).tanh()
        return self.head(self.after(self.put(h, mask, rows)).tanh().mean(1))


def batch(*counts: int) -> tuple[Tensor, Tensor]:
    """Samples of eight tokens, of which so many are chosen."""
    x = torch.randn(len(counts), 8, 6)
    for sample, count in zip(x, counts, strict=True):
        sample[:, 0] = sample[:, 0].abs() * torch.where(torch.arange(8) < count, 1, -1)
    return x, torch.randint(0, 3, (len(counts),))


def measure(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> spt.Sensitivity:
    return spt.measure_sensitivity(model, batches, include=["*"], head=(), progress=False)


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("counts", [(4, 4), (1, 1)], ids=str)
def test_as_many_in_one_batch_and_not_in_the_next(pick: str, counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Picking(PICKS[pick], by_assignment)
    batches = [batch(*counts), batch(2, 6), batch(0, 2), batch(3, 4, 5)]
    found = measure(model, batches)
    assert_exact(found, model, batches)
    assert set(found.fallback) == {"chosen.weight", "chosen.bias"}


@pytest.mark.parametrize("put", PUTS)
def test_what_is_put_back_is_as_any_other(put: str) -> None:
    torch.manual_seed(0)
    model = Picking(PICKS["mask"], PUTS[put])
    batches = [batch(4, 4), batch(2, 6)]
    found = measure(model, batches)
    assert_exact(found, model, batches)
    assert set(found.fallback) == {"chosen.weight", "chosen.bias"}


class Unpadded(nn.Module):
    """Texts without their padding from the first layer on, as ModernBERT runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.layer = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        where = places(ids != 0)
        h = self.norm(self.words(ids.flatten()[where]))
        h = h + self.layer(h).tanh()
        padded = h.new_zeros(ids.numel(), 8)
        padded[where] = h
        return self.head(padded.view(*ids.shape, 8).sum(1))


def test_texts_without_their_padding() -> None:
    torch.manual_seed(0)
    batches = []
    for counts in ((4, 4), (2, 6), (3, 5)):
        ids = torch.randint(1, 9, (2, 8)) * (torch.arange(8) < torch.tensor(counts)[:, None])
        batches.append((ids, torch.tensor([0, 2])))
    model = Unpadded()
    found = spt.measure_sensitivity(model, batches, include=["*"], head=(), progress=False)
    truth = {name: torch.zeros_like(score) for name, score in found.items()}
    for ids, labels in batches:
        for one, label in zip(ids.split(1), labels.split(1), strict=True):
            loss = nn.functional.cross_entropy(model(one), label)
            gradients = torch.autograd.grad(loss, [model.get_parameter(n) for n in truth])
            for total, gradient in zip(truth.values(), gradients, strict=True):
                total += gradient.square()
    for name, score in truth.items():
        torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-8, msg=name)


def test_a_mask_that_all_samples_share_chooses_no_rows() -> None:
    torch.manual_seed(0)

    def of_channels(h: Tensor, mask: Tensor) -> Tensor:
        return h[:, :, torch.arange(8) >= 0]

    model = Picking(of_channels, lambda h, mask, rows: rows)
    batches = [batch(4, 4), batch(2, 6)]
    found = measure(model, batches)
    assert_exact(found, model, batches)
    assert not found.fallback


def test_an_order_of_tokens_within_each_sample_chooses_no_rows() -> None:
    torch.manual_seed(0)

    def by_first_feature(h: Tensor, mask: Tensor) -> Tensor:
        return h.gather(1, h[..., :1].argsort(1).expand_as(h))

    model = Picking(by_first_feature, lambda h, mask, rows: rows)
    batches = [batch(4, 4), batch(2, 6)]
    found = measure(model, batches)
    assert_exact(found, model, batches)
    assert not found.fallback


def test_samples_that_are_stacked_again_are_a_batch() -> None:
    torch.manual_seed(0)
    model = Picking(lambda h, mask: torch.stack([one * 2 for one in h]), lambda h, mask, rows: rows)
    batches = [batch(4, 4), batch(2, 6)]
    found = measure(model, batches)
    assert_exact(found, model, batches)
    assert not found.fallback

"""The way to a sparse weight gradient: rates follow from the cards, and choices from the rates."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from bench.cards import CARDS, Card
from bench.gradient_model import rates_of, uniform_index
from spt_kernels.kernels import sparse_weight_grad
from spt_kernels.kernels.card import Launch, capability_of
from spt_kernels.kernels.gradient_cost import RATES, Way, cheapest_way
from spt_kernels.kernels.tile_plan import plan_tiles
from spt_kernels.kernels.token_split import split_tokens

# of two cards with one capability the rates are those of the first
FIRST_CARDS = list({card.capability: card for card in reversed(CARDS)}.values())


@pytest.mark.parametrize("is_fp32", [False, True], ids=["narrow", "fp32"])
@pytest.mark.parametrize("card", FIRST_CARDS, ids=lambda card: card.name)
def test_rates_are_those_of_the_model(card: Card, is_fp32: bool) -> None:
    derived = asdict(rates_of(card, is_fp32=is_fp32))
    for name, shipped in asdict(RATES[card.capability, is_fp32]).items():
        assert shipped == pytest.approx(derived[name], rel=0.03), name


# Microseconds of kernels on an H100 80GB HBM3, 12,608 tokens, torch 2.11, Triton 3.6, 2026-11-28:
# rows, columns, density, whether in a quarter of the rows and columns, fp32; then every way
H100_US = [
    (3072, 768, 0.005, False, False, {Way.DENSE: 93, Way.VECTORS: 315, Way.TILES: 62}),
    (3072, 768, 0.02, False, False, {Way.DENSE: 93, Way.VECTORS: 1174, Way.TILES: 133}),
    (3072, 768, 0.02, True, False, {Way.DENSE: 94, Way.VECTORS: 876, Way.TILES: 76}),
    (768, 768, 0.005, False, False, {Way.DENSE: 39, Way.VECTORS: 121, Way.TILES: 31}),
    (768, 768, 0.02, False, False, {Way.DENSE: 39, Way.VECTORS: 304, Way.TILES: 34}),
    (3072, 768, 0.005, False, True, {Way.DENSE: 1182, Way.VECTORS: 510, Way.TILES: 713}),
    (3072, 768, 0.02, False, True, {Way.DENSE: 1180, Way.VECTORS: 1348, Way.TILES: 1805}),
    (3072, 768, 0.02, True, True, {Way.DENSE: 1171, Way.VECTORS: 1048, Way.TILES: 219}),
    (768, 768, 0.005, False, True, {Way.DENSE: 319, Way.VECTORS: 136, Way.TILES: 197}),
    (768, 768, 0.02, False, True, {Way.DENSE: 320, Way.VECTORS: 443, Way.TILES: 460}),
]


def mask(rows: int, columns: int, density: float, in_a_quarter: bool) -> torch.Tensor:
    if not in_a_quarter:
        return uniform_index(rows, columns, density).int()
    generator = torch.Generator().manual_seed(0)
    some_rows, some_columns = (
        torch.randperm(size, generator=generator)[: size // 4] for size in (rows, columns)
    )
    every = (some_rows[:, None] * columns + some_columns).flatten()
    chosen = torch.randperm(len(every), generator=generator)[: int(density * rows * columns)]
    return every[chosen].sort().values.int()


@pytest.mark.parametrize(("rows", "columns", "density", "in_a_quarter", "is_fp32", "us"), H100_US)
def test_what_is_taken_was_the_fastest_on_a_card(
    rows: int, columns: int, density: float, in_a_quarter: bool, is_fp32: bool, us: dict[Way, float]
) -> None:
    index = mask(rows, columns, density, in_a_quarter)
    plan = plan_tiles(index, rows, columns)
    way = cheapest_way(plan, len(index), (rows, columns), capability=90, is_fp32=is_fp32)
    assert way is min(us, key=lambda way: us[way])


@pytest.mark.parametrize(
    ("density", "capability", "is_fp32", "way"),
    [
        (0.0001, 90, False, Way.VECTORS),
        (0.005, 80, False, Way.TILES),
        (0.02, 80, True, Way.TILES),
        (0.005, 86, True, Way.VECTORS),
        (0.05, 86, True, Way.DENSE),
    ],
)
def test_choices_at_fc1(density: float, capability: int, is_fp32: bool, way: Way) -> None:
    index = uniform_index(3072, 768, density).int()
    plan = plan_tiles(index, 3072, 768)
    chosen = cheapest_way(plan, len(index), (3072, 768), capability=capability, is_fp32=is_fp32)
    assert chosen is way


def test_without_a_plan_no_tiles() -> None:
    for nnz in (10, 10**4, 10**6):
        way = cheapest_way(None, nnz, (3072, 768), capability=90, is_fp32=True)
        assert way is (Way.DENSE if nnz > 10**5 else Way.VECTORS)


@pytest.mark.parametrize(
    ("capability", "taken_for"),
    [
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 90),
        ((12, 0), 86),  # 99 KB of shared memory, not 227
    ],
    ids=lambda value: str(value),
)
def test_an_unlisted_card_is_taken_for_the_one_before(
    capability: tuple[int, int], taken_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert capability_of(torch.device("cuda")) == taken_for
    assert (taken_for, True) in RATES


def test_torch_widens_a_product_as_the_dense_way_asks_it_to() -> None:
    # on a card alone: here the call is traced without one
    with FakeTensorMode():
        left = torch.empty(8, 16, dtype=torch.bfloat16, device="cuda")
        right = torch.empty(8, 4, dtype=torch.bfloat16, device="cuda")
        product = sparse_weight_grad._product(left.T, right)
        assert (product.dtype, product.shape) == (torch.float32, (16, 4))


@pytest.mark.parametrize("programs", [1, 6, 48, 5000])
@pytest.mark.parametrize("n_tokens", [1, 511, 1024, 12_608])
def test_splits_cover_all_tokens_in_whole_blocks(n_tokens: int, programs: int) -> None:
    launch = Launch(tokens=32, num_warps=4, num_stages=3, programs_per_sm=2)
    splits, tokens = split_tokens(n_tokens, programs, launch, torch.device("cpu"))
    assert tokens % 32 == 0
    assert (splits - 1) * tokens < n_tokens <= splits * tokens
    assert splits == 1 or tokens >= 512 - 32
    # 16 programs are resident: with 5,000 a split gains nothing
    assert programs < 5000 or splits == 1

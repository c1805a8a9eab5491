"""Tuning by PEFT: its adapters on some layers of a model, and the head besides."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import MissingExtra, needed
from ..model import backbone_numel, head_names
from .matrices import block_matrices, check_rank
from .method import Method
from .tunable import Tunable, counted


def peft() -> Any:
    """The library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        with needed("method: what is PEFT's", "peft"):
            import peft
    except MissingExtra as error:
        raise ValueError(str(error)) from error
    return peft


def tune_by(
    model: nn.Module, method: Method, config: Callable[..., Any], targets: Iterable[str]
) -> Tunable:
    """Put PEFT's adapters on the modules called `targets`.

    Args:
        model: plain; wrapped afterwards.
        method: which has a head.
        config: makes the adapters' configuration.
        targets: names of modules.
    """
    names = head_names(model, method.head)
    heads = sorted({name.rpartition(".")[0] for name in names})
    numel = sum(model.get_parameter(name).numel() for name in names)
    chosen = config(target_modules=list(targets), modules_to_save=heads)
    library = peft()
    with warnings.catch_warnings():
        # it copies the head, of a fake model too, and torch then asks where no data are
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        tuned = library.get_peft_model(model, chosen)
    return counted(tuned, _fold, in_head=numel)


def _fold(tuned: Any) -> nn.Module:
    plain: nn.Module = tuned.merge_and_unload()
    return plain


def tune_all_by(model: nn.Module, method: Method, config: Callable[..., Any]) -> Tunable:
    """On every matrix of the blocks, of the highest rank that the budget allows.

    Raises:
        ValueError: it does not allow rank 1, or more than a matrix can have.
    """
    matrices = block_matrices(model, method.head)
    of_rank_1 = sum(sum(what.shape) for what in matrices.values())
    budget = method.count(backbone_numel(model, method.head))
    rank = budget // of_rank_1
    if rank < 1:
        raise ValueError(f"budget: rank 1 on every matrix trains {of_rank_1:,}, got {budget:,}")
    check_rank("budget", rank, (what.shape for what in matrices.values()))
    return tune_by(model, method, functools.partial(config, r=rank), matrices)

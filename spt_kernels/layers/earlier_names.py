"""Models that were pickled whole before 0.8.0 name modules by where they were then."""

from __future__ import annotations

import sys

from .autograd import lora_call, mask_keys, row_ranges, sparse_gradient, tuned_linear
from .deltas import never_called, sparse_delta, written_state

# those whose classes and functions are in a pickle of a tuned model
_IN_PICKLES = (
    *(lora_call, mask_keys, row_ranges, sparse_gradient, tuned_linear),
    *(never_called, sparse_delta, written_state),
)


def know_earlier_names() -> None:
    """Let what such a model names be found."""
    for module in _IN_PICKLES:
        sys.modules[f"{__package__}.{module.__name__.rpartition('.')[2]}"] = module

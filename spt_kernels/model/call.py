"""How a model is called with a batch, as it is or a mapping by its keys, and the loss it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def call(model: nn.Module, input: Any) -> Any:
    """`model(input)`, or `model(**input)` of a mapping whose keys its forward takes by name."""
    if isinstance(input, Mapping) and _takes_by_name(model, input):
        return model(**input)
    return model(input)


def parted(
    batch: Mapping[str, Any], loss_fn: Callable[..., Any] | None, name: str = "batch"
) -> tuple[Any, Any]:
    """What of a batch the model is given, and the target of `loss_fn`.

    That is its `labels`. Without a loss function there is no target: the model gets all.

    Raises:
        ValueError: there are no labels for `loss_fn`; `name` is what the caller's argument is.
    """
    rest = dict(batch)
    if loss_fn is None:
        return rest, None
    if "labels" not in rest:
        raise ValueError(f"{name}: expected 'labels' for loss_fn, got {sorted(batch)}")
    return rest, rest.pop("labels")


def check_batch(
    name: str, batch: Mapping[Any, Any], loss_fn: Callable[..., Any] | None
) -> dict[str, Tensor]:
    """A mapping as a dictionary, if it is a batch of tensors with a row for each sample.

    Args:
        name: what the caller's argument is called.
        batch: as transformers has it, of any class.
        loss_fn: None for the loss of the model itself.

    Raises:
        TypeError: a key is no string, or a value no tensor.
        ValueError: nothing in it, no samples, not as many in each, or no labels for `loss_fn`.
    """
    for key, value in batch.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: expected tensors by name, as model(**batch) takes them, got "
                f"{type(value).__name__} under {key!r}"
            )
    if not batch:
        raise ValueError(f"{name}: expected tensors by name, got none")
    sizes = {key: value.shape[0] if value.ndim else 0 for key, value in batch.items()}
    size = next(iter(sizes.values()))
    for key, own in sizes.items():
        if own == 0 or own != size:
            raise ValueError(
                f"{name}[{key!r}]: expected {size or 'some'} rows, one for each sample, got a "
                f"tensor of shape {tuple(batch[key].shape)}"
            )
    parted(batch, loss_fn, name)  # or it says what is missing
    return dict(batch)


def _takes_by_name(model: nn.Module, input: Mapping[str, Any]) -> bool:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(**input)
    except TypeError:  # an unknown key, a missing argument, a key that is no string
        return False
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    takes_anything = set(kinds.values()) == {inspect.Parameter.VAR_KEYWORD}
    # keys that a `**kwargs` alone takes say nothing of a forward whose first argument is a mapping
    return takes_anything or any(
        kinds.get(key) not in (None, inspect.Parameter.VAR_KEYWORD) for key in input
    )


def loss_in(output: Any, name: str = "batches") -> Tensor:
    """The loss that a model gives with its output, first of all as transformers' models do.

    Args:
        output: of the model.
        name: what the caller's argument is called whose batches are mappings.

    Raises:
        ValueError: there is none, or it is no scalar.
    """
    if isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, (tuple, list)) and output else None
    if isinstance(loss, Tensor) and loss.numel() != 1 and isinstance(output, Mapping):
        raise ValueError(
            f"{name}: a batch is a mapping, and so the model's 'loss' must be a scalar, got one of "
            f"shape {tuple(loss.shape)}: give a loss_fn"
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found: Any = type(output).__name__
        if isinstance(output, Mapping):
            found = sorted(key for key, value in output.items() if value is not None)
        raise ValueError(
            f"{name}: a batch is a mapping, and so the model's output must have its loss, a scalar "
            f"under 'loss', got {found}: put labels into the batch, or give a loss_fn"
        )
    return loss.reshape(()) if loss.ndim else loss

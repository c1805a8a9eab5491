"""Whether two parameters are one: by the objects, or by the memory that both lie in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def identity_of(parameter: Tensor) -> object:
    """Equal for two parameters that are one object or that begin at one place in memory.

    Tied weights come to lie in one memory as two objects where a checkpoint that holds them twice
    is assigned (`load_state_dict(assign=True)`), or through `.data`.
    """
    if not has_memory(parameter):
        return id(parameter)
    start = parameter.storage_offset() * parameter.element_size()
    return parameter.device, parameter.untyped_storage()._cdata, start


def sharing_names(every: Iterable[tuple[str, Tensor]]) -> dict[str, list[str]]:
    """Name of what is shared -> the others, of the same parameter or of ones in its memory.

    Args:
        every: all of a model's names and parameters, as `named_parameters(remove_duplicate=False)`
            gives them.
    """
    together: dict[object, list[tuple[str, Tensor]]] = {}
    for name, parameter in every:
        own = parameter.untyped_storage()._cdata if has_memory(parameter) else id(parameter)
        together.setdefault(own, []).append((name, parameter))
    found: dict[str, list[str]] = {}
    for group in together.values():
        for place, (name, parameter) in enumerate(group):
            for other, another in group[place + 1 :]:
                if parameter is another or _overlap(parameter, another):
                    found.setdefault(name, []).append(other)
                    found.setdefault(other, []).append(name)
    return found


def check_own_memory(
    trained: Iterable[str], parameters: Mapping[str, Tensor], shared: Mapping[str, Sequence[str]]
) -> None:
    """Refuse to train what lies in the memory of another parameter: it has a part of the gradient.

    Tied weights that are one parameter have all of it.

    Args:
        trained: names.
        parameters: of the model, by all of their names.
        shared: of `sharing_names`.

    Raises:
        ValueError: names the first.
    """
    for name in trained:
        for other in shared.get(name, ()):
            if parameters[other] is not parameters[name]:
                raise ValueError(
                    f"{name} is shared with {other}: two parameters lie in one memory; give each "
                    "its own, or make them one parameter again, as tie_weights() of transformers "
                    "does"
                )


def has_memory(parameter: Tensor) -> bool:
    """Whether there is memory to compare: one of a class of its own may have none."""
    return type(parameter) is nn.Parameter and parameter.numel() > 0


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether an element of one tensor is in that of another, both of one storage."""
    (start, stop), (begin, end) = _span(one), _span(other)
    if stop <= begin or end <= start:
        return False
    if one.dtype != other.dtype:
        return True
    # columns of one matrix lie between each other
    first, last = min(start, begin), max(stop, end)
    taken = torch.zeros((last - first) // one.element_size(), dtype=torch.bool, device="cpu")
    _within(taken, one, start - first).fill_(True)
    return bool(_within(taken, other, begin - first).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage between the first that a tensor has and the end of its last."""
    start, size = int(tensor.storage_offset()), tensor.element_size()
    last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size


def _within(taken: Tensor, tensor: Tensor, start: int) -> Tensor:
    """The places of a tensor's elements where its first is at byte `start`; expanded ones once."""
    along = [(n, by) for n, by in zip(tensor.shape, tensor.stride(), strict=True) if by]
    place = start // tensor.element_size()
    return taken.as_strided([n for n, _ in along], [by for _, by in along], place)

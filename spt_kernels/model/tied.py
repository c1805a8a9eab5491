"""Whether two parameters are one: by the objects, or by the memory that both lie in."""

from __future__ import annotations

from torch import Tensor, nn


def identity_of(parameter: Tensor) -> object:
    """Equal for two parameters that are one object or that begin at one place in memory.

    Tied weights come to lie in one memory as two objects where a checkpoint that holds them twice
    is assigned (`load_state_dict(assign=True)`), or through `.data`.
    """
    if type(parameter) is not nn.Parameter or not parameter.numel():
        return id(parameter)  # of a class of its own, which may have no memory to compare
    start = parameter.storage_offset() * parameter.element_size()
    return parameter.device, parameter.untyped_storage()._cdata, start

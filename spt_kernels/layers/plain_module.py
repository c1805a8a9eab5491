"""How a tuned module shares parameters with the plain one it stands for, and gives it back."""

from __future__ import annotations

from torch import nn


def keep_plain(tuned: nn.Module, plain: nn.Module) -> None:
    """Give a tuned module a plain one's parameters, buffers and hooks, under the same names."""
    tuned.__dict__["_spt_plain"] = plain  # not as a submodule: its parameters would appear twice
    for name, parameter in plain._parameters.items():
        tuned.register_parameter(name, parameter)
    for name, buffer in plain._buffers.items():
        tuned.register_buffer(name, buffer, name not in plain._non_persistent_buffers_set)
    share_hooks(tuned, plain)
    tuned.train(plain.training)


def share_hooks(tuned: nn.Module, plain: nn.Module) -> None:
    """Let hooks that were or will be put on either module run on the tuned one."""
    for name, value in vars(plain).items():
        if name.startswith(("_forward_", "_backward_")) or name == "_is_full_backward_hook":
            tuned.__dict__[name] = value


def plain_of(tuned: nn.Module) -> nn.Module:
    """The plain module, with the parameters and buffers that the tuned one holds now."""
    plain: nn.Module = tuned.__dict__["_spt_plain"]
    for name in plain._parameters:
        plain._parameters[name] = tuned._parameters[name]
    for name in plain._buffers:
        plain._buffers[name] = tuned._buffers[name]
    return plain.train(tuned.training)

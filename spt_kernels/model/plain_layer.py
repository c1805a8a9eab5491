"""Whether a layer computes what the layer of torch does that its class derives from."""

from __future__ import annotations

from torch import nn

_READ_BY_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear
_TIMM_LINEAR = "timm.layers.linear.Linear"  # it only adds a cast under TorchScript


def runs_as_linear(module: nn.Module) -> bool:
    """Whether the class of a module has the forward of `nn.Linear`, and is called for it."""
    return is_class_of_linears(type(module))


def is_class_of_linears(kind: type[nn.Module]) -> bool:
    """`runs_as_linear` of the modules of a class."""
    # A subclass with a forward of its own (weight standardisation, ...) computes something else.
    # The attention of torch never calls the forward of its output projection.
    if not issubclass(kind, nn.Linear) or issubclass(kind, _READ_BY_ATTENTION):
        return False
    return kind.forward is nn.Linear.forward or f"{kind.__module__}.{kind.__name__}" == _TIMM_LINEAR


def runs_as_conv2d(module: nn.Module) -> bool:
    """Whether the class of a module has the forward of `nn.Conv2d`."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
    )

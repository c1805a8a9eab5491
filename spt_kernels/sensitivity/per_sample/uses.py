"""How each sample's gradient of a parameter follows from one call's output gradient and input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Gradient of a parameter by sample: a matrix and a vector as factors that are multiplied and summed
# over tokens, a whole one as it is, and one that tokens look rows up in by the numbers of these. A
# matrix without a second factor is whole as well.
Kind = Literal["matrix", "vector", "whole", "lookup"]


class Factors(NamedTuple):
    """Two factors of a gradient, of each sample; the second stands for ones where there is none.

    Attributes:
        grad_output: `[samples, tokens, ...]`, or the whole gradient `[samples, *shape]`.
        input: `[samples, tokens, ...]`; of a lookup the rows, `[samples, tokens]`.
        mean: fp32 `[samples, tokens]`, what is to be subtracted of the input.
        rstd: fp32 `[samples, tokens]`, what it is to be multiplied by then.
    """

    grad_output: Tensor
    input: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None

    def among(self, channels: slice) -> Factors:
        """Those of some of the channels."""
        input = None if self.input is None else self.input[..., channels]
        return self._replace(grad_output=self.grad_output[..., channels], input=input)


# (samples, grad_output [rows, ...], then what was saved [rows, ...]) -> factors;
# a batch of k rows for each sample is what a model makes that works on k windows of each
Rule = Callable[..., Factors]

_UNFOLDED_NUMEL = 1 << 24  # 64 MiB of fp32: what an unfolded convolution input may take at a time


def whole(kind: Kind, factors: Factors) -> Tensor:
    """The gradients that factors stand for, `[samples, ...]`."""
    grad_output, input, mean, rstd = factors
    if kind == "whole" or (kind == "matrix" and input is None):
        return grad_output
    if kind == "matrix":
        assert input is not None
        return torch.einsum("bto,bti->boi", grad_output.float(), input.float())
    if input is None:
        return grad_output.float().sum(1)
    if mean is not None and rstd is not None:
        input = (input.float() - mean[..., None]) * rstd[..., None]
    return (grad_output.float() * input).sum(1)


class Role(NamedTuple):
    """A parameter in its place in a call: `weight` of a Linear, `bias` of a norm, and so on."""

    parameter: Tensor | None
    kind: Kind
    rule: Rule
    needs_input: bool = True
    samples_numel: int = 0  # numbers that `rule` makes of one row of the batch; 0: views
    derived: bool = False  # what is used was made of the parameter
    transposed: bool = False  # of a matrix `[in, out]`: the two factors change places

    def samples_at_once(self, rows_per_sample: int) -> int:
        """How many samples `rule` may take at a time where it makes something of them."""
        return max(1, _UNFOLDED_NUMEL // (self.samples_numel * rows_per_sample))


class Use(NamedTuple):
    """One call that multiplies or shifts by parameters: its input, and each parameter's role."""

    input: Tensor
    roles: tuple[Role, ...]
    saves_as_computed: bool = False  # whether the input may be kept in the output's dtype
    has_statistics: bool = False  # whether autograd may keep the mean and rstd of each row anyway


def tokens_of(samples: int, x: Tensor) -> Tensor:
    """`[rows, ..., features]` as `[samples, tokens, features]`."""
    if x.ndim == 3 and x.shape[0] == samples:
        return x
    return x.reshape(samples, -1, x.shape[-1])


def _joined_last(x: Tensor, n_dims: int) -> Tensor:
    """The last dimensions as one."""
    return x if n_dims == 1 else x.flatten(-n_dims)


def _last(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
    """Channels in the last dimension."""
    grad_output = tokens_of(samples, grad_output)
    return Factors(grad_output, None if input is None else tokens_of(samples, input))


def on_axis(axis: int) -> Rule:
    """Channels in dimension `axis` of a row, counted from its end."""

    def rule(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
        moved = None if input is None else input.movedim(axis, -1)
        return _last(samples, grad_output.movedim(axis, -1), moved)

    return rule


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    """`F.linear`."""
    if input.ndim < 2:
        return None
    roles = (Role(weight, "matrix", _last), Role(bias, "vector", _last, needs_input=False))
    return Use(input, roles, saves_as_computed=True)


def quantized_linear(input: Tensor, weight: Tensor, bias: Tensor | None, matrix: Any) -> Use | None:
    """The same of what stands for a quantized weight."""
    return linear(input, weight, bias)


def addmm(*args: Any, **kwargs: Any) -> Use | None:
    """`torch.addmm(bias, input, weight)`, a Linear whose weight is `[in, out]`."""
    if len(args) != 3 or kwargs or args[0].ndim != 1:
        return None
    bias, input, weight = args

    def rule(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
        assert input is not None
        return _last(samples, input, grad_output)

    roles = (
        Role(weight, "matrix", rule, transposed=True),
        Role(bias, "vector", _last, needs_input=False),
    )
    return Use(input, roles, saves_as_computed=True)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Use | None:
    """`F.layer_norm`: what multiplies the weight is normalized as it is read, and never kept."""
    shape = tuple(normalized_shape)
    n_dims = len(shape)
    if input.ndim <= n_dims:
        return None

    def rule(
        samples: int,
        grad_output: Tensor,
        input: Tensor | None = None,
        mean: Tensor | None = None,
        rstd: Tensor | None = None,
    ) -> Factors:
        if input is None:
            return _last(samples, _joined_last(grad_output, n_dims))
        if mean is None or rstd is None:
            mean, rstd = torch.native_layer_norm(input.float(), shape, None, None, eps)[1:]
        factors = _last(samples, _joined_last(grad_output, n_dims), _joined_last(input, n_dims))
        return factors._replace(mean=mean.reshape(samples, -1), rstd=rstd.reshape(samples, -1))

    return _norm(input, weight, bias, rule)._replace(has_statistics=True)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Use | None:
    """`F.rms_norm`."""
    shape = tuple(normalized_shape)
    if eps is not None:
        return _norm_over_last(
            input, len(shape), weight, None, lambda x: F.rms_norm(x.float(), shape, None, eps)
        )
    # which eps torch then takes is a matter of its version and of both dtypes
    ones = None if weight is None else torch.ones_like(weight.detach())
    return _norm_over_last(
        input, len(shape), weight, None, lambda x: F.rms_norm(x, shape, ones, None).float()
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Use | None:
    """`F.group_norm`."""
    return _norm_over_channels(
        input, weight, bias, lambda x: F.group_norm(x, num_groups, None, None, eps)
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Use | None:
    """`F.batch_norm` by its running statistics; statistics of the batch are no sample's own."""
    if training or running_mean is None or running_var is None:
        return None
    shape = (-1, *(1,) * (input.ndim - 2))
    mean = running_mean.float().view(shape)
    rstd = (running_var.float() + eps).rsqrt().view(shape)
    return _norm_over_channels(input, weight, bias, lambda x: (x - mean) * rstd)


def _norm_over_last(
    input: Tensor,
    n_dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    normalize: Callable[[Tensor], Tensor],
) -> Use | None:
    if input.ndim <= n_dims:
        return None

    def rule(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
        normalized = None if input is None else _joined_last(normalize(input), n_dims)
        return _last(samples, _joined_last(grad_output, n_dims), normalized)

    return _norm(input, weight, bias, rule)


def _norm_over_channels(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalize: Callable[[Tensor], Tensor]
) -> Use | None:
    if input.ndim < 2:
        return None
    channels = on_axis(1 - input.ndim)  # from the end

    def rule(samples: int, grad_output: Tensor, input: Tensor | None = None) -> Factors:
        return channels(samples, grad_output, None if input is None else normalize(input.float()))

    return _norm(input, weight, bias, rule)


def _norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule) -> Use:
    weights = Role(weight, "vector", rule, samples_numel=input[0].numel())
    return Use(input, (weights, Role(bias, "vector", rule, needs_input=False)))


def multiply(first: Any, second: Any, is_parameter: Callable[[Any], object]) -> Use | None:
    """`x * weight` with one weight per channel, as a layer scale has it."""
    x, weight = (second, first) if is_parameter(first) else (first, second)
    axis = _channel_axis(x, weight)
    if axis is None or is_parameter(x):
        return None
    return Use(x, (Role(weight, "vector", on_axis(axis)),))


def add(first: Any, second: Any, is_parameter: Callable[[Any], object]) -> Use | None:
    """`x + bias` with one bias per channel."""
    x, bias = (second, first) if is_parameter(first) else (first, second)
    axis = _channel_axis(x, bias)
    if axis is None or is_parameter(x):
        return None
    return Use(x, (Role(bias, "vector", on_axis(axis), needs_input=False),))


def multiply_add(bias: Any, weight: Any, x: Any) -> Use | None:
    """`torch.addcmul(bias, weight, x)` with one weight and one bias per channel."""
    axis = _channel_axis(x, weight)
    if axis is None or axis != _channel_axis(x, bias):
        return None
    weights = Role(weight, "vector", on_axis(axis))
    return Use(x, (weights, Role(bias, "vector", on_axis(axis), needs_input=False)))


def _channel_axis(x: Any, vector: Any) -> int | None:
    """The dimension of `x`, from its end, along which `vector` has one number each."""
    if not isinstance(x, Tensor) or not isinstance(vector, Tensor) or vector.ndim >= x.ndim + 1:
        return None
    if x.is_complex() or vector.is_complex():
        return None  # the gradient of a real factor takes both parts of the other
    axes = [axis for axis in range(-vector.ndim, 0) if vector.shape[axis] != 1]
    if len(axes) != 1 or axes[0] == -x.ndim or x.shape[axes[0]] != vector.numel():
        return None
    return axes[0]

"""How trained parameters stay fp32 when the model around them is moved to another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


def keeping_fp32(
    fn: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter]
) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` should apply in place of `fn`: the same, save for these dtypes.

    A delta is often smaller than one rounding of the weight that it belongs to: in bf16 most
    optimizer steps would be lost.
    """
    kept = list(parameters)
    kept_or_grad: list[Tensor] = [*kept, *(p.grad for p in kept if p.grad is not None)]

    def apply(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype != tensor.dtype and any(tensor is other for other in kept_or_grad):
            return tensor.to(device=result.device)
        return result

    return apply

"""torch's own attention, run so that the products in it are seen, with samples in the first place.

`F.multi_head_attention_forward` asks for a parameter's class before it begins, and what it does
then is out of sight; its tokens come before its samples. Here its code runs with another `linear`:
the same products, of tokens that are turned to `[samples, tokens, features]` and back.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...ops.torch_internals import EnableTorchFunction

_PARTS = ("_in_projection_packed", "_in_projection")  # which call `linear` as well


def attention(args: Any, kwargs: Any) -> Any:
    """What `F.multi_head_attention_forward` gives of its arguments, of which the query is first."""
    query: Tensor = args[0]
    batch = query.shape[1] if query.ndim == 3 else 1

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens_first = input if input.ndim == 3 else input.unflatten(0, (-1, batch))
        output = F.linear(tokens_first.transpose(0, 1), weight, bias).transpose(0, 1).contiguous()
        return output if input.ndim == 3 else output.flatten(0, 1)

    names = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    names |= {name: _with_names(names[name], names) for name in _PARTS}
    with EnableTorchFunction():
        return _with_names(F.multi_head_attention_forward, names)(*args, **kwargs)


def _with_names(function: Any, names: dict[str, Any]) -> FunctionType:
    """A function that looks up its globals in `names`."""
    code, defaults, closure = function.__code__, function.__defaults__, function.__closure__
    made = FunctionType(code, names, function.__name__, defaults, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made

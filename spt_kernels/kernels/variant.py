"""What one shipped specialisation of a Triton kernel is: enough to compile it without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# The dtypes that activations, gradients and weights come in, and Triton's pointers to them
POINTER: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}
FLOAT_DTYPES = tuple(POINTER)


def short_name(dtype: torch.dtype) -> str:
    """`fp32`, `bf16` or `fp16`: how a variant's name spells its dtypes."""
    return POINTER[dtype].removeprefix("*")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that Triton specialises on, as the launcher would pass it.

    Attributes:
        name: unique within its file, e.g. `"tiles-bf16-64x64"`.
        kernel: the `@triton.jit` function.
        types: run-time argument -> Triton type (`"*bf16"`, `"fp32"`) where that is neither the
            kernel's annotation nor, without one, `"i32"`.
        constexprs: value of every `tl.constexpr` argument, and of run-time integers that are
            always 1 at launch (a unit stride), which Triton folds in as constants too.
        num_warps: warps per program.
        num_stages: depth of software pipelining.
        load_bits: the width that global loads must reach in the compiled code; 0 promises nothing.
        store_bits: likewise of global stores.
        is_thin: its products have fewer rows than Hopper's own units take, so that nothing fences
            what is read ahead.
        capability: the only card that it is launched on, one of `card.CAPABILITIES`; 0: all.
        programs_per_sm: programs that the launcher counts on a multiprocessor to hold at once.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    load_bits: int = 0
    store_bits: int = 0
    is_thin: bool = False
    capability: int = 0
    programs_per_sm: int = 0

    @property
    def signature(self) -> dict[str, str]:
        """Run-time argument -> Triton type, constexprs left out."""
        return {
            parameter.name: self.types.get(parameter.name, parameter.annotation_type or "i32")
            for parameter in self.kernel.params
            if parameter.name not in self.constexprs
        }

    @property
    def aligned(self) -> tuple[str, ...]:
        """Run-time arguments that Triton finds divisible by 16 at launch.

        They are pointers from the allocator, and sizes and strides, of which the kernel declares
        with `do_not_specialize` those that may be no multiples of 16.
        """
        unknown = self.kernel.do_not_specialize
        return tuple(
            name for name, kind in self.signature.items() if kind[0] in "*i" and name not in unknown
        )

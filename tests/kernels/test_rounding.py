"""Narrow weights are rounded to nearest by the hardware, which the interpreter cannot show."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("file", "name"), [("write_delta", "write"), ("sparse_adamw", "nearest")], ids=str
)
def test_conversions_round_to_nearest(file: str, name: str, capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bench.compilation import variants_of

    variant = variants_of(file)[name]
    signature = {
        argument: variant.signature.get(argument, "constexpr")
        for argument in variant.kernel.arg_names
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs))
    options = {"num_warps": variant.num_warps}
    ptx = triton.compile(source, GPUTarget("cuda", capability, 32), options).asm["ptx"]

    modes = set(re.findall(r"cvt\.(r\w+)\.(?:satfinite\.)?(bf16|f16)(?:x2)?\.f32", ptx))
    assert modes == {("rn", "bf16"), ("rn", "f16")}

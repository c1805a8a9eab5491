"""Triton kernels and their launchers, one file per op; importing it needs Triton."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this op on CUDA tensors needs Triton, which cannot be imported: `pip install triton`"
    ) from error

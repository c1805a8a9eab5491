"""What the calls of a model go by, and which of them are of no matter."""

from __future__ import annotations

from typing import Any

# what only looks at a tensor, or lets no gradient through
INERT_CALLS = frozenset(
    {"shape", "size", "dim", "ndim", "numel", "nelement", "stride", "storage_offset"}
    | {"dtype", "device", "layout", "is_cuda", "is_cpu", "is_floating_point", "is_complex"}
    | {"is_contiguous", "is_nested", "is_sparse", "is_quantized", "element_size", "data_ptr"}
    | {"requires_grad", "is_leaf", "grad", "grad_fn", "detach", "data", "__len__", "__hash__"}
)


def call_name(func: Any) -> str:
    """What a call goes by; a property's getter by the property."""
    name = getattr(func, "__name__", "")
    # the getter of a property is an anonymous `__get__` of the property's descriptor
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name

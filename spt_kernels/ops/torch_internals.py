"""What this package takes of PyTorch that PyTorch calls its own: each of it here, under one name.

Another torch may have lost or renamed any of it. What is lost is an error where it is called, that
tells its name, and not where this is imported; `LOST` lists it, and a test that this is empty.
Names stand for the very objects of torch: a function around one would be a frame in each step.
"""

from __future__ import annotations

import functools
import operator
import sys
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

LOST: list[str] = []  # paths below `torch` that this torch has not


def _of_torch(path: str) -> Any:
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None:
        LOST.append(path)
        return functools.partial(_refuse, path)
    return found


def _refuse(path: str, *_: Any, **__: Any) -> Any:
    raise RuntimeError(
        f"spt_kernels needs {path} of torch, which {torch.__version__} does not have: take a newer "
        "spt_kernels, or an older torch"
    )


# ---- who listens to calls

# () -> int: modes of `TorchDispatchMode` that are on
count_dispatch_modes = _of_torch("_C._len_torch_dispatch_stack")
# () -> those modes, and the two of `create_selective_checkpoint_contexts`
dispatch_modes = _of_torch("utils._python_dispatch._get_current_dispatch_mode_stack")
CachingMode = _of_torch("utils.checkpoint._CachingTorchDispatchMode")
CachedMode = _of_torch("utils.checkpoint._CachedTorchDispatchMode")
# () -> bool: whether `vmap`, `grad` or another transform of `torch.func` is at work
is_functorch_active = _of_torch("_C._are_functorch_transforms_active")
# () -> bool: whether autocast is on for any device but MPS, in a quarter of the time of asking each
is_any_autocast_enabled = _of_torch("_C._is_any_autocast_enabled")
# () -> what `torch.compile` was given for frames; None or False where it is not on
compiler_callback = _of_torch("_C._dynamo.eval_frame.get_eval_frame_callback")
# contexts: calls on subclasses of tensors, or to modes of functions too, go to torch at once; the
# last undoes both
DisableTorchFunctionSubclass = _of_torch("_C.DisableTorchFunctionSubclass")
DisableTorchFunction = _of_torch("_C.DisableTorchFunction")
EnableTorchFunction = _of_torch("_C._EnableTorchFunction")

# ---- autograd

# () -> hooks of saved tensors that are asked first, as a pair; None without any
hooks_in_use: Any = functools.partial(
    _of_torch("_C._autograd._top_saved_tensors_default_hooks"), False
)
# (pack, unpack) -> None, and () -> None: what `saved_tensors_hooks` does at its ends
push_hooks = _of_torch("_C._autograd._push_saved_tensors_default_hooks")
pop_hooks = _of_torch("_C._autograd._pop_saved_tensors_default_hooks")
# () -> bool: whether there may be such hooks; under some transforms there may not
are_hooks_allowed = _of_torch("_C._autograd._saved_tensors_hooks_is_enabled")
# () -> the node whose backward is running, or None
current_node = _of_torch("_C._current_autograd_node")
# () -> int: which backward pass is running in this thread; -1 where none is
current_graph_task = _of_torch("_C._current_graph_task_id")
# (call) -> None: runs a call at the end of the backward pass that is running
queue_callback = _of_torch("autograd.Variable._execution_engine.queue_callback")
# (tensor, tensor) -> bool: whether they lie in one storage
is_alias_of = _of_torch("_C._is_alias_of")
# of `is_grads_batched`, whose vmap is another than that of `torch.func`: (tensor) -> bool, whether
# it is a batch; (tensor, level, size, dim) -> without its batch; (tensor, dim, level) -> with it
is_batch = _of_torch("_C._functorch.is_legacy_batchedtensor")
remove_batch_dim = _of_torch("_remove_batch_dim")
add_batch_dim = _of_torch("_add_batch_dim")
# of the transforms of `torch.func`: (tensor) -> bool, whether it is what one has made of another;
# whether a batch that `vmap` looks at as one; and (tensor) -> that other
is_wrapped = _of_torch("_C._functorch.is_functorch_wrapped_tensor")
is_vmapped = _of_torch("_C._functorch.is_batchedtensor")
unwrapped = _of_torch("_C._functorch.get_unwrapped")
# a context: within it tensors that no transform was given are what they are outside of transforms
without_transforms = _of_torch("_functorch.pyfunctorch.temporarily_clear_interpreter_stack")

# ---- convolutions

# what `select_conv_backend` gives of a convolution's arguments and the sizes of its bias
ConvBackend = _of_torch("_C._ConvBackend")
select_conv_backend = _of_torch("_C._select_conv_backend")

# ---- what is no object that stays: read each time

_of_torch("autograd.forward_ad._current_level")
_of_torch("utils.hooks.RemovableHandle.next_id")

# () -> int: the id of the next hook that anyone registers
next_hook_id = functools.partial(operator.attrgetter("next_id"), RemovableHandle)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is at work.

    Our ops know nothing of these: they are refused, or what they add to a tangent is lost.
    """
    return is_functorch_active() or forward_ad._current_level >= 0  # compilers trace this


def is_backward_compiled() -> bool:
    """Whether compiled autograd is on; its module is there once something has been compiled."""
    module = _loaded("torch._dynamo.compiled_autograd")
    return module is not None and getattr(module, "compiled_autograd_enabled", False)


_loaded = sys.modules.get

"""The verbs on a tuned model as a whole: save its task, load one, merge it, drop it."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from ..approximation import approximate
from ..distributed.sharded import is_sharded, reshard, sharers
from ..errors import BaseModelMismatch
from ..model.check import check_trainable_itself
from ..model.quantized import make_float, quantized_names
from ..offloading import brought_back
from .base_model import BaseModel, holds_peft, is_data_parallel, unwrap
from .file.format import TaskFile, decode, read, write
from .file.metadata import as_json
from .fit import Fit, has_same_structure
from .frozen import FrozenState
from .intact import drop_problem, merge_problem, task_problem
from .transfer import capture, drop, fill, hold, put

# of the format, whatever the ops take
_SAVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def _with_all_weights(
    verb: Callable[Concatenate[nn.Module, _Rest], _Result],
) -> Callable[Concatenate[nn.Module, _Rest], _Result]:
    """Let a verb find the weights of an offloaded model on its device, which go back afterwards."""

    @functools.wraps(verb)
    def run(model: nn.Module, *args: _Rest.args, **kwargs: _Rest.kwargs) -> _Result:
        _check_is_module(model)
        with brought_back(model):
            return verb(model, *args, **kwargs)

    return run


def save_delta(
    model: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Write the task of a tuned model to one file, whole or not at all.

    It holds the sparse deltas, LoRA and Adapter tensors, the head and whatever else is trainable,
    buffers that forwards have changed, such as running statistics, the plan, and a fingerprint of
    the base weights of every touched tensor, as `apply` found them. The same model gives the same
    bytes.

    Of a model that `fully_shard` has dealt out, every process calls this: the values are brought
    together, and rank 0 writes the file. Its frozen values are taken to be what they were.

    Of an average of tuned models (an EMA) pass the averaged model itself, `ema.module`, while the
    model that was averaged still is there.

    Args:
        model: tuned; may be wrapped by `torch.compile` or data parallelism. Not changed, but that
            frozen values which averaging has rounded are what they were again.
        path: of the file. An older one is replaced at the very end.
        dtype: `float32` stores every value as it is; `bfloat16` or `float16` round all that is
            trained to nearest. Buffers are always stored as they are.
        metadata: whatever else the file is to tell, as JSON knows it: dicts with strings as keys,
            lists, strings, numbers, booleans, None. `read_metadata` gives it back. What is under
            `"classes"`, `"preprocessing"` and `"model"` is what commands go by, and must be of the
            form that `read_metadata` describes. Of a model that `approximate` was called on, what
            that did is under `"approximation"`, unless something else is.

    Returns:
        The size of the file in bytes.

    Raises:
        TypeError: something in `metadata` is not JSON; says where.
        ValueError: the model is not tuned, or no longer as `apply` made it, so that the file would
            fit no base; it holds values that are NaN, infinite, or too large for `dtype`;
            `metadata` is of another form, or names another number of classes than the head has.
        OSError: the file cannot be written; what was at `path` stays.
        OtherProcessFailed: likewise, in the processes that do not write a sharded model's.
    """
    if dtype not in _SAVED_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    task = task_of(model, dtype, as_json(metadata))
    return sharers(model).from_first(lambda: write(task, path))


@_with_all_weights
def task_of(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> TaskFile:
    """What `save_delta` writes; arguments and errors as there."""
    bare = _tuned(model, "save")
    reshard(bare)
    now = BaseModel.of(bare)
    _refuse("save", task_problem(bare, now))
    frozen = FrozenState.of(bare, now)
    _refuse("save", frozen.problem)
    label = getattr(bare, "spt_approximation", None)
    told = metadata if label is None else {"approximation": label.to_json(), **metadata}
    task = capture(bare, now, frozen, dtype, told)
    frozen.write_back(now)
    return task


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a task file tells besides what it trains: the `metadata` that `save_delta` was given.

    Everything may be in it. Three keys have a meaning, and a form that is checked when the file is
    written and when it is read; each of them may be absent:

    * `"classes"`: list of the names of the head's outputs, in their order, as many as there are.
    * `"preprocessing"`: dict with `"size"` (the side of the square image in pixels, or
      `[height, width]`), `"mean"` and `"std"` (lists of one number per channel, for values in 0 to
      1) and `"interpolation"` (such as `"bicubic"`); more may be in it.
    * `"model"`: dict with `"name"` (of the architecture, such as timm's) and, if there are any, its
      constructor's `"arguments"` as a dict; more may be in it.

    Args:
        path: of a file that `save_delta` wrote.

    Returns:
        A dict of its own, tuples having become lists; empty where nothing was said.

    Raises:
        DeltaFormatError: the file is damaged, cut, of a newer format, or no task file.
        OSError: the file cannot be read, `FileNotFoundError` among them.
    """
    return copy.deepcopy(dict(read(path).metadata))


@torch.inference_mode(False)  # what is made in it could never be trained
def load_delta(
    model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True
) -> nn.Module:
    """Put the task in a file onto its base model, in place; a tuned model drops its own task first.

    Everything is checked before the model is touched. When the model already holds a task of the
    same structure, the new values are copied into the same parameters, so that optimizers,
    compiled code and data-parallel wrappers stay valid. Otherwise layers are tuned as `apply` does.
    A head of another number of classes is replaced, and comes back with `unload`; so does what the
    model says of its classes: `num_classes`, or `num_labels` and the names in a `config` of
    transformers, which are those in the file's metadata where it has them.

    The head and the deltas are trainable afterwards, the rest is frozen. Into a tuned model that
    `fully_shard` has dealt out every process loads a task of the same structure; rank 0 reads it.

    Args:
        model: the base model, or one tuned from it; on any device, in the dtype it was saved in.
        path: of a file that `save_delta` wrote.
        check_base: False puts the task, on purpose, on other weights of the same shapes than it was
            trained over, as on those that its base was quantized from: it then works as far as
            these are alike, which nothing checks.

    Returns:
        The model.

    Raises:
        DeltaFormatError: the file is damaged, cut, of a newer format, or holds what must not be
            loaded.
        BaseModelMismatch: it was made for another base model; names the first tensor that differs.
        ValueError: the task's structure is another one and the model is wrapped for data
            parallelism or sharded; the model was tuned and is no longer as `apply` made it.
        OSError: the file cannot be read, `FileNotFoundError` among them.
        OtherProcessFailed: likewise, in the processes that do not read a sharded model's.
    """
    _check_is_module(model)
    file = sharers(model).from_first(Path(path).read_bytes)
    return load_task(model, decode(file, path), os.fspath(path), check_base=check_base)


@torch.inference_mode(False)
@_with_all_weights
def load_task(
    model: nn.Module, task: TaskFile, source: str, *, check_base: bool = True
) -> nn.Module:
    """`load_delta` of what was in a file, which messages call `source`."""
    _refuse_peft(model, "load a task", "load_adapter(folder, name)")
    bare = unwrap(model)
    reshard(bare)
    now = BaseModel.of(bare)
    frozen = None
    if now.is_sharded and not (_is_tuned(bare) and has_same_structure(bare, now, task)):
        raise ValueError(
            "fully_shard has dealt out the parameters, and the model is not tuned as the task has "
            "it: load the task before fully_shard"
        )
    if _is_tuned(bare):
        _refuse("load a task", task_problem(bare, now))
        frozen = FrozenState.of(bare, now)
    fit = Fit.of(bare, now, task, frozen, check_base=check_base)
    if fit.problem is not None:
        raise BaseModelMismatch(f"{source}: made for another base model: {fit.problem}")
    if frozen is None:
        _refuse_wrapped_for_loading(model)
        put(bare, task, fit.digests)
        return model
    previous = hold(bare, now)
    if has_same_structure(bare, now, task):
        try:
            fill(bare, now, task)
        except BaseException:
            fill(bare, now, previous)
            raise
        frozen.write_back(now)
        return model
    _refuse_wrapped_for_loading(model)
    _refuse("load a task in place of this one", drop_problem(bare, now) or frozen.problem)
    frozen.write_back(now)
    drop(bare, now)
    try:
        put(bare, task, fit.digests)
    except BaseException:
        put(bare, previous)
        raise
    return model


@_with_all_weights
def merge(model: nn.Module) -> nn.Module:
    """Fold the task into the weights, in place: plain module types, nothing extra at inference.

    Sparse deltas are in the weights already. LoRA is added in fp32 and rounded once to the weight's
    dtype. The head and buffers such as running statistics stay as trained. What required a gradient
    before `apply` requires it again. What `approximate` has done is undone.

    Args:
        model: tuned with LoRA or sparse deltas; an Adapter is not linear and cannot be folded in.

    Returns:
        The model, no longer tuned; there is no way back but the task file.

    Raises:
        ValueError: the model is not tuned, has an Adapter or something trained beside a quantized
            weight (named), lacks something that `apply` left, or is wrapped for data parallelism or
            sharded. The model is as it was.
    """
    _refuse_peft(model, "merge", "merge_and_unload()")
    bare = _tuned(model, "merge")
    now = BaseModel.of(bare)
    problem = merge_problem(now)
    if problem is not None:
        raise ValueError(f"cannot merge {problem}")
    _refuse_wrapped(model, "merge")
    _refuse("merge", task_problem(bare, now))
    FrozenState.of(bare, now).write_back(now)
    drop(bare, now, merge=True)
    approximate(bare)  # nothing is: it is plain
    return model


@torch.inference_mode(False)  # what is made in it could never be trained
@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make floats of the quantized weights of all Linears, in place; a tuned model keeps its task.

    Such a model gives what it gave, up to rounding, and `merge` can fold its task in. The weights
    are those that the quantized ones stand for, not those that they were quantized from.

    Args:
        model: plain or tuned. What it trains are new parameters afterwards: make a new optimizer.
        dtype: of the floats, such as `torch.bfloat16`; by default that in which each layer stands
            for its values.

    Returns:
        The model; its Linears of bitsandbytes are of the class `nn.Linear`.

    Raises:
        TypeError: `dtype` is no floating dtype.
        ValueError: the model has nothing quantized; it is tuned and no longer as `apply` made it;
            it is wrapped for data parallelism, held by PEFT, or quantized in a way that is not
            served. The model is as it was.
    """
    _check_is_module(model)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating dtype or None, got {dtype!r}")
    if holds_peft(model):
        raise ValueError("cannot dequantize: PEFT holds the model: model.unload() first")
    _refuse_wrapped(model, "dequantize")
    bare = unwrap(model)
    if not quantized_names(bare):
        raise ValueError(f"cannot dequantize: {type(bare).__name__} has no quantized parameter")
    if not _is_tuned(bare):
        check_trainable_itself(bare, "dequantize")
        make_float(bare, dtype)
        return model
    now = BaseModel.of(bare)
    _refuse("dequantize", drop_problem(bare, now))
    frozen = FrozenState.of(bare, now)
    _refuse("dequantize", frozen.problem)
    frozen.write_back(now)
    held = hold(bare, now)
    drop(bare, now)
    try:
        make_float(bare, dtype)
    finally:
        put(bare, held)
    return model


@_with_all_weights
def unload(model: nn.Module) -> nn.Module:
    """Drop the task, in place: modules, weights, buffers and head of the base, bit for bit.

    Args:
        model: tuned, in whichever way.

    Returns:
        The model, as it was before `apply` or `load_delta`, `requires_grad` included.

    Raises:
        ValueError: the model is not tuned, a parameter was trained whole without its base value
            being known, a layer or the head was replaced or a frozen value changed since `apply`,
            or the model is wrapped for data parallelism or sharded. The model is as it was.
    """
    _refuse_peft(model, "unload", "unload()")
    bare = _tuned(model, "unload")
    _refuse_wrapped(model, "unload")
    now = BaseModel.of(bare)
    _refuse("unload", drop_problem(bare, now))
    frozen = FrozenState.of(bare, now)
    _refuse("unload", frozen.problem)
    frozen.write_back(now)
    drop(bare, now)
    return model


def _is_tuned(model: nn.Module) -> bool:
    return getattr(model, "spt_tuning", None) is not None


def _check_is_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _tuned(model: nn.Module, verb: str) -> nn.Module:
    bare = unwrap(model)
    if not _is_tuned(bare):
        inner = getattr(bare, "module", None)  # of what averages a model, for one
        if isinstance(inner, nn.Module) and _is_tuned(inner):
            raise ValueError(
                f"cannot {verb}: the model is a {type(bare).__name__} around a tuned one: pass "
                "model.module"
            )
        raise ValueError(
            f"cannot {verb}: the model is not tuned; apply a plan or load a task first"
        )
    return bare


def _refuse_wrapped_for_loading(model: nn.Module) -> None:
    if is_data_parallel(model):
        raise ValueError(
            "model is wrapped for data parallelism, which holds on to the parameters it has: load "
            "the task before wrapping it, or pass model.module and wrap it anew"
        )


def _is_sharded(model: nn.Module) -> bool:
    return any(map(is_sharded, model.parameters()))


def _refuse_wrapped(model: nn.Module, verb: str) -> None:
    if _is_sharded(model):
        raise ValueError(
            f"cannot {verb} where fully_shard has dealt out the parameters: save the task, load it "
            "onto a base model that is whole, and go on with that"
        )
    if is_data_parallel(model):
        raise ValueError(
            f"cannot {verb} under a data parallel wrapper, which holds on to the parameters it "
            "has: pass model.module and wrap it anew"
        )


def _refuse_peft(model: nn.Module, verb: str, instead: str) -> None:
    if holds_peft(model):
        raise ValueError(
            f"cannot {verb}: PEFT holds the model and would not know: model.{instead} does it there"
        )


def _refuse(verb: str, problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"cannot {verb}: {problem}")

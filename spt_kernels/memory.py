"""How much memory a training step needs, counted on fake tensors: no GPU, no arithmetic."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from .memory_cpu import CpuLedger
from .memory_cuda import CudaLedger, run_backward, take_default_path
from .memory_estimate import MemoryEstimate
from .memory_ledger import AnyValue, Ledger
from .memory_twin import fake_copy, tensors_of
from .method import METHODS, Method
from .method_plan import make_plan
from .plan import Plan
from .synthetic_sensitivity import skewed_sensitivity
from .tuning import apply

__all__ = ["DTYPES", "MemoryEstimate", "Rehearsal", "estimate_memory"]

DTYPES = ("fp32", "bf16-autocast", "bf16")
DEVICES = ("cpu", "cuda")


def estimate_memory(
    model: nn.Module,
    batch_shape: Sequence[int],
    plan: Plan | None = None,
    *,
    method: str | None = None,
    budget: int | float | None = None,
    rank: int | None = None,
    dtype: str = "fp32",
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw",
    training: bool = True,
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    checkpointing: bool = False,
    device: str = "cuda",
) -> MemoryEstimate:
    """Account for the peak memory of a training step (or of inference) without running one.

    Forward, backward and optimizer step run on fake tensors, which have shapes but no storage,
    while every storage that comes and goes is counted at its nominal size. It is a step in the
    midst of training, which meets the optimizer's state of the one before. Not counted: what
    most kernels allocate within themselves, fragmentation, the CUDA context. `largest_batch` finds
    the batch for a given memory.

    Args:
        model: any module, plain or tuned already, by another library too; neither changed nor
            copied. Its parameters may be on the meta device.
        batch_shape: shape of the input, `(batch, 3, height, width)`.
        plan: tune the (plain) model so, and train that; `method` is then only what to call it, as
            it is for a model that is tuned already, and is refused where the two contradict.
        method: one of `spt_kernels.method.METHODS`, as `spt-kernels finetune` trains it: `"full"`,
            `"linear"` (the head), `"bias"` (every bias and the head), `"lora"` (on q and v, and
            the head), or `"spt-lora"`, `"spt-adapter"`, `"spt-unstructured"`. Those three choose by
            made-up scores, as skewed as measured ones, where there is no plan. None trains what the
            plan says, or else what `requires_grad` says.
        budget: of an `spt-*` method or `"lora"`: a count, or a share of the backbone below 1; by
            default 0.5 %, and any that `rank` costs for `"lora"`.
        rank: of the LoRA or Adapter modules of these methods, by default 8.
        dtype: `"fp32"`, `"bf16-autocast"` (fp32 weights under autocast), or `"bf16"` (weights too).
        optimizer: `"adamw"`, `"sgd"` (with momentum), `"none"`, or a function that makes one.
        training: False for a forward pass without gradients.
        loss_fn: takes the model's output and an int64 target `[batch]` of zeros.
        checkpointing: recompute blocks in the backward (the model's `set_grad_checkpointing`).
        device: `"cuda"` accounts for what PyTorch keeps and makes on a card of sm_80 or newer (its
            attention kernels, its autocast, its dropout, blocks of 512 bytes), without one; `"cpu"`
            for what it does on a CPU.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, nothing to train, or an input of a shape that the
            model cannot take.
    """
    return Rehearsal(
        model,
        plan,
        method=method,
        budget=budget,
        rank=rank,
        dtype=dtype,
        optimizer=optimizer,
        training=training,
        loss_fn=loss_fn,
        checkpointing=checkpointing,
        device=device,
    ).at(batch_shape)


class Rehearsal:
    """A training step on fake tensors, prepared once and rehearsed for any number of batches.

    The arguments are those of `estimate_memory`, which rehearses for one batch alone.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        *,
        method: str | None = None,
        budget: int | float | None = None,
        rank: int | None = None,
        dtype: str = "fp32",
        optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw",
        training: bool = True,
        loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
        checkpointing: bool = False,
        device: str = "cuda",
    ) -> None:
        _check_choices(dtype, optimizer, training, checkpointing, device)
        plan, self._label = _choose(model, plan, method, budget, rank)
        self._dtype, self._training, self._loss_fn = dtype, training, loss_fn
        self._checkpointing, self._device = checkpointing, device
        # real tensors (constants that a model makes for itself) are let in, and not counted
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        twin, besides = fake_copy(model, self._fakes, torch.bfloat16 if dtype == "bf16" else None)
        if plan is not None:
            apply(twin, plan)
            twin, besides = fake_copy(twin, self._fakes)  # what tuning has added is still real
        elif method == "full":
            for parameter in twin.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        if checkpointing:
            _checkpoint(twin)
        trainable = [p for p in twin.parameters() if p.requires_grad]
        if training and not trainable:
            raise ValueError(
                "no parameter of the model requires a gradient, there is nothing to train"
            )
        self._num_trainable = sum(p.numel() for p in trainable)
        self._twin: nn.Module = twin
        self._besides = besides  # alive as long as the model is
        self._ledger: Ledger = CudaLedger() if device == "cuda" else CpuLedger()
        self._optimizer: torch.optim.Optimizer | None = None
        # An optimizer of ours leaves its state and nothing else behind its first step; what
        # another one does in that alone is seen in a second one.
        self._steps = 2 if callable(optimizer) else 1
        with self._fakes, self._ledger:
            self._ledger.mark(itertools.chain(tensors_of(twin), besides), "weights")
            if training:
                self._optimizer = _make_optimizer(twin, trainable, optimizer)
            if device == "cuda" and self._optimizer is not None:
                take_default_path(self._optimizer)

    def at(self, batch_shape: Sequence[int]) -> MemoryEstimate:
        """The estimate for one shape of the input; errors are those of `estimate_memory`."""
        shape = _as_shape(batch_shape)
        self._twin.zero_grad(set_to_none=True)
        ledger, autocast = self._ledger, self._dtype == "bf16-autocast"
        with self._fakes, ledger:
            began = ledger.moment()
            batch = torch.empty(shape, dtype=torch.bfloat16 if self._dtype == "bf16" else None)
            ledger.mark([batch], "activations")
            if self._training:
                for _ in range(self._steps):
                    _train_once(self._twin, batch, self._loss_fn, self._optimizer, ledger, autocast)
                self._steps = 1
            else:
                _infer_once(self._twin, batch, autocast)
        by_category = ledger.peak_of_step(began)
        return MemoryEstimate(
            peak_bytes=sum(by_category.values()),
            by_category=by_category,
            method=self._label,
            batch_shape=shape,
            dtype=self._dtype,
            training=self._training,
            num_trainable=self._num_trainable,
            checkpointing=self._checkpointing,
            device=self._device,
        )


def _choose(
    model: nn.Module,
    plan: Plan | None,
    method: str | None,
    budget: int | float | None,
    rank: int | None,
) -> tuple[Plan | None, str]:
    """What to train, None for everything or what the model says itself, and what to call it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be a Plan, got {type(plan).__name__}: Plan.load(path) reads a file"
        )
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
    tuning: Any = getattr(model, "spt_tuning", None)
    if tuning is not None and plan is not None:
        raise ValueError("plan: the model is tuned already, by a plan of its own")
    known = plan if plan is not None else getattr(tuning, "plan", None)
    if known is not None:
        whose = "the plan" if plan is not None else "the model, which is tuned already,"
        for name, value in (("budget", budget), ("rank", rank)):
            if value is not None:
                raise ValueError(f"{name}: {whose} has its own, got {value!r}; leave it out")
        if method is not None and not _is_such(known, method):
            raise ValueError(f"method={method!r}: {whose} trains something else; leave it out")
        return plan, method or f"spt-{known.kind or 'unstructured'}"
    if method is None:
        for name, value in (("budget", budget), ("rank", rank)):
            if value is not None:
                raise ValueError(f"{name}: is of a method, and none was given; got {value!r}")
        return None, "as given"
    chosen = Method(method, budget, rank)
    scores = skewed_sensitivity(model) if chosen.is_sensitivity_aware else None
    return make_plan(model, chosen, scores), method


def _is_such(plan: Plan, method: str) -> bool:
    """Whether a plan may be one of `method`, which is a label beside it."""
    kind, has_entries = plan.kind, bool(plan.unstructured)
    return {
        "full": False,
        "linear": kind is None and not has_entries,
        "bias": kind is None,
        "lora": kind == "lora" and not has_entries,
        "spt-lora": kind == "lora",
        "spt-adapter": kind == "adapter",
        "spt-unstructured": kind is None,
    }[method]


def _as_shape(batch_shape: Sequence[int]) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(size) for size in batch_shape)
    except TypeError:
        raise TypeError(
            f"batch_shape must be a sequence of whole numbers, got {batch_shape!r}"
        ) from None
    if not shape or min(shape) < 1:
        raise ValueError(f"batch_shape must hold sizes of at least 1, got {shape}")
    return shape


def _checkpoint(model: nn.Module) -> None:
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if not callable(switch):
        raise ValueError(
            f"checkpointing=True needs a model with set_grad_checkpointing, as timm's have; "
            f"{type(model).__name__} has none"
        )
    try:
        switch(True)
    except AssertionError as error:  # timm's way to say so
        raise ValueError(
            f"checkpointing=True: {type(model).__name__} does not support it ({error})"
        ) from error


def _make_optimizer(
    model: nn.Module,
    trainable: list[nn.Parameter],
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer],
) -> torch.optim.Optimizer | None:
    # fused: the step makes no temporary tensors of its own
    if optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    if optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=1e-3, momentum=0.9, fused=True)
    made = optimizer(model) if callable(optimizer) else None
    if made is not None and not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    return made


def _train_once(
    model: nn.Module,
    batch: Tensor,
    loss_fn: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
    ledger: Ledger,
    autocast: bool,
) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    ledger.begin_forward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = _forward(model, batch)
        target = torch.zeros(batch.shape[0], dtype=torch.int64)
        loss = loss_fn(output, target)
    ledger.end_forward()
    run_backward(loss)
    ledger.mark((parameter.grad for parameter in model.parameters()), "gradients")
    if optimizer is not None:
        with AnyValue():
            optimizer.step()
        ledger.mark(tree_iter(list(optimizer.state.values())), "optimizer")


@torch.no_grad()
def _infer_once(model: nn.Module, batch: Tensor, autocast: bool) -> None:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _forward(model, batch)


def _forward(model: nn.Module, batch: Tensor) -> Any:
    try:
        return model(batch)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"batch_shape: {type(model).__name__} cannot take {tuple(batch.shape)}: {reason}"
        ) from error


def _check_choices(
    dtype: Any, optimizer: Any, training: Any, checkpointing: Any, device: Any
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if not callable(optimizer) and optimizer not in ("adamw", "sgd", "none"):
        raise ValueError(
            "optimizer must be 'adamw', 'sgd', 'none' or a function of the model, "
            f"got {optimizer!r}"
        )
    for name, value in (("training", training), ("checkpointing", checkpointing)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if checkpointing and not training:
        raise ValueError(
            "checkpointing=True is for training: inference keeps nothing that it could recompute"
        )

"""How much memory a training step needs, counted on fake tensors: no GPU, no arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from .allocation import LoraSpec, Plan
from .anatomy import candidate_names, describe, head_names
from .memory_cpu import CpuLedger
from .memory_cuda import CudaLedger, take_default_path
from .memory_ledger import AnyValue, Ledger
from .memory_twin import fake_copy, tensors_of
from .tuning import apply

METHODS = ("full", "linear", "bias", "lora", "spt", "spt-lora", "spt-adapter", "spt-unstructured")
DTYPES = ("fp32", "bf16-autocast", "bf16")


@dataclass(frozen=True)
class MemoryEstimate:
    """Accounted memory at the moment of a step when it is highest.

    Attributes:
        peak_bytes: all live tensors at that moment.
        by_category: the same bytes as `weights` (parameters and buffers), `optimizer` (its state),
            `gradients` (of parameters), `activations` (the batch, and what the forward keeps for
            the backward) and `temporary` (everything else).
        method: what is trained.
        batch_shape: shape of the input.
        dtype: `"fp32"`, `"bf16-autocast"` or `"bf16"`.
        training: whether it is a training step or a forward without gradients.
        num_trainable: parameters that are trained, head included.
    """

    peak_bytes: int
    by_category: Mapping[str, int]
    method: str
    batch_shape: tuple[int, ...]
    dtype: str
    training: bool
    num_trainable: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_category", MappingProxyType(dict(self.by_category)))

    def summary(self) -> str:
        """A text table of the peak by category, in MiB."""
        step = "training step" if self.training else "inference"
        shape = " × ".join(map(str, self.batch_shape))
        lines = [f"{self.method}, {step} on {shape}, {self.dtype} (accounted, not measured)"]
        rows = [*self.by_category.items(), ("peak", self.peak_bytes)]
        lines += [f"{name:<12}{count / 2**20:>12,.2f} MiB" for name, count in rows]
        return "\n".join(lines)


def estimate_memory(
    model: nn.Module,
    batch_shape: Sequence[int],
    plan: Plan | None = None,
    *,
    method: str | None = None,
    dtype: str = "fp32",
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw",
    training: bool = True,
    loss_fn: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    rank: int = 8,
    checkpointing: bool = False,
    device: str = "cpu",
) -> MemoryEstimate:
    """Account for the peak memory of a training step (or of inference) without running one.

    Forward, backward and optimizer step run twice on fake tensors, which have shapes but no
    storage, while every storage that comes and goes is counted at its nominal size. The second
    step meets the optimizer state of the first, as any later one does. Not counted: what most
    kernels allocate within themselves, fragmentation, the CUDA context.

    Args:
        model: any module, plain or tuned already, by another library too; neither changed nor
            copied.
        batch_shape: shape of the input, `(batch, 3, height, width)`.
        plan: tune the (plain) model so, and train that; `method` is then only what to call it.
        method: `"full"`, `"linear"` (the head), `"bias"` (biases and the head), or `"lora"` (a LoRA
            of `rank` on every Linear outside stem and head, and the head). None, or `"spt"` and its
            kinds, train what the plan says, or else what `requires_grad` says.
        dtype: `"fp32"`, `"bf16-autocast"` (fp32 weights under autocast), or `"bf16"` (weights too).
        optimizer: `"adamw"`, `"sgd"` (with momentum), `"none"`, or a function that makes one.
        training: False for a forward pass without gradients.
        loss_fn: takes the model's output and an int64 target `[batch]` of zeros.
        rank: of `method="lora"`.
        checkpointing: recompute blocks in the backward (the model's `set_grad_checkpointing`).
        device: `"cuda"` accounts for what PyTorch keeps and makes on a card of sm_80 or newer (its
            attention kernels, its autocast, its dropout, blocks of 512 bytes), without one.

    Raises:
        ValueError: an argument out of range, or nothing to train.
    """
    shape = tuple(int(size) for size in batch_shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"batch_shape must hold sizes of at least 1, got {tuple(batch_shape)}")
    _check_choices(method, dtype, optimizer)
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    tuned = hasattr(model, "spt_tuning")
    if plan is None and not tuned and (method or "").startswith("spt"):
        raise ValueError(f"method={method!r} needs a plan, or a model that is tuned already")
    if tuned and (plan is not None or method in ("full", "linear", "bias", "lora")):
        raise ValueError("the model is tuned already: give neither a plan nor another method")

    # real tensors (constants that a model makes for itself) are let in, and not counted
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    twin, besides = fake_copy(model, fakes, torch.bfloat16 if dtype == "bf16" else None)
    label = method or _label(plan, model)
    if plan is None and method == "lora":
        plan = _lora_everywhere(twin, rank)
    if plan is not None:
        apply(twin, plan)
        twin, besides = fake_copy(twin, fakes)  # what tuning has added is still real
    elif method is not None:
        _choose_trainable(twin, method)
    if checkpointing:
        _checkpoint(twin)
    trainable = [p for p in twin.parameters() if p.requires_grad]
    if training and not trainable:
        raise ValueError("no parameter of the model requires a gradient, there is nothing to train")

    ledger = CudaLedger() if device == "cuda" else CpuLedger()
    with fakes, ledger:
        ledger.mark(itertools.chain(tensors_of(twin), besides), "weights")
        batch = torch.empty(shape)
        if dtype == "bf16":
            batch = batch.bfloat16()
        ledger.mark([batch], "activations")
        if training:
            made = _make_optimizer(twin, trainable, optimizer)
            if device == "cuda" and made is not None:
                take_default_path(made)
            for _ in range(2):
                _train_once(twin, batch, loss_fn, made, ledger, dtype == "bf16-autocast")
        else:
            _infer_once(twin, batch, dtype == "bf16-autocast")
    by_category = ledger.peak()
    return MemoryEstimate(
        peak_bytes=sum(by_category.values()),
        by_category=by_category,
        method=label,
        batch_shape=shape,
        dtype=dtype,
        training=training,
        num_trainable=sum(p.numel() for p in trainable),
    )


def _lora_everywhere(model: nn.Module, rank: int) -> Plan:
    info = describe(model)
    specs = {
        name: LoraSpec(rank, ((0, info[name].shape[0]),), info[name].shape[1])
        for name in candidate_names(model)
        if info[name].kind == "linear"
    }
    of_specs = {name: info[name] for name in specs}
    return Plan({}, specs, of_specs, head=head_names(model), kind="lora", rank=rank)


def _choose_trainable(model: nn.Module, method: str) -> None:
    if method not in ("full", "linear", "bias"):
        return  # tuned already
    head = set(head_names(model))
    for name, parameter in model.named_parameters():
        chosen = method == "full" or name in head
        chosen = chosen or (method == "bias" and name.rpartition(".")[2] == "bias")
        parameter.requires_grad_(chosen and parameter.is_floating_point())


def _label(plan: Plan | None, model: nn.Module) -> str:
    tuning: Any = getattr(model, "spt_tuning", None)
    if plan is None and tuning is None:
        return "as given"
    kind = tuning.plan.kind if plan is None else plan.kind
    return f"spt-{kind or 'unstructured'}"


def _checkpoint(model: nn.Module) -> None:
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    if not callable(switch):
        raise ValueError(
            f"checkpointing=True needs a model with set_grad_checkpointing, as timm's have; "
            f"{type(model).__name__} has none"
        )
    switch(True)


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
    return optimizer(model) if callable(optimizer) else None


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
        output = model(batch)
        target = torch.zeros(batch.shape[0], dtype=torch.int64)
        loss = loss_fn(output, target)
    ledger.end_forward()
    loss.backward()
    ledger.mark((parameter.grad for parameter in model.parameters()), "gradients")
    if optimizer is not None:
        with AnyValue():
            optimizer.step()
        ledger.mark(tree_iter(list(optimizer.state.values())), "optimizer")


@torch.no_grad()
def _infer_once(model: nn.Module, batch: Tensor, autocast: bool) -> None:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(batch)


def _check_choices(method: Any, dtype: Any, optimizer: Any) -> None:
    if method is not None and method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or None, got {method!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not callable(optimizer) and optimizer not in ("adamw", "sgd", "none"):
        raise ValueError(
            "optimizer must be 'adamw', 'sgd', 'none' or a function of the model, "
            f"got {optimizer!r}"
        )

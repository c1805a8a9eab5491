"""A training step rehearsed on fake tensors, to count its memory: no GPU, no arithmetic."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from ..methods import Method, entry_of, tune
from ..methods.method import name_of
from ..methods.peft_shira import let_fakes_run
from ..model import HeadPatterns, backbone_numel, head_names
from ..model.check import check_not_offloaded, check_not_wrapped
from ..model.head import as_patterns
from ..offloading import OffloadedAdamW
from ..offloading.streamed_block import StreamedBlock
from ..plan import Plan
from ..recomputation import Recomputation, parts_of, recompute_by
from ..recomputation import recompute as recompute_parts
from ..recomputation.choice import What
from ..tuning.whole import is_coarse, train_whole
from .batch import BatchForm, batch_form, empty_batch, input_of, shape_of
from .block_use import BlockUse, BlockWatch
from .cpu import CpuLedger
from .cuda import CudaLedger, take_default_path
from .estimate import MemoryEstimate
from .ledger import Ledger
from .made_up import made_up_plan
from .step import Step, on_its_own, switch_on_checkpointing
from .twin import fake_copy, tensors_of
from .work import Work, WorkCounter


def estimate_memory(
    model: nn.Module,
    batch_shape: Sequence[int] | Mapping[str, Tensor],
    plan: Plan | None = None,
    *,
    method: str | None = None,
    budget: int | float | None = None,
    rank: int | None = None,
    head: HeadPatterns | None = None,
    dtype: str = "fp32",
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw",
    training: bool = True,
    loss_fn: Callable[[Any, Tensor], Tensor] | None = None,
    checkpointing: bool = False,
    recompute: What | None = None,
    device: str = "cuda",
    offload: str = "nothing",
    keep_bytes: int = 0,
    micro_batch: int | None = None,
    accumulate: int = 1,
) -> MemoryEstimate:
    """Account for the peak memory of a training step (or of inference) without running one.

    Forward, backward and optimizer step run on fake tensors, which have shapes but no storage,
    while every storage that comes and goes is counted at its nominal size. It is a step in the
    midst of training, which meets the optimizer's state of the one before. Not counted: what
    most kernels allocate within themselves, fragmentation, the CUDA context. `largest_batch` finds
    the batch for a given memory.

    Args:
        model: any module, plain or tuned already, by another library too; a copy without values is
            made, which its attributes must allow. Its parameters may be on the meta device.
        batch_shape: shape of the input, `(batch, 3, height, width)`; or a batch as `model(**batch)`
            takes it, a mapping to tensors, of which only shapes and dtypes are read: they may be on
            the meta device.
        plan: tune the (plain) model so, and train that; `method` is then only what to call it, as
            it is for a model that is tuned already, and is refused where the two contradict.
        method: the name of one of `spt_kernels.methods`, as `spt-kernels finetune` trains it:
            `"full"`, `"linear"`, `"lora-16"`, `"spt-lora"`, … Those that choose by sensitivity take
            made-up scores, as skewed as measured ones, where there is no plan. None trains what the
            plan says, or else what `requires_grad` says.
        budget: of a method that has one: a count, or a share of the backbone below 1; by default
            0.5 %, and any that `rank` costs for `"lora"`.
        rank: of the LoRA or Adapter modules of `"lora"` and `"spt-*"`, by default 8.
        head: what a method trains whole besides, as `measure_sensitivity` has it; by name when left
            out, as there is no sample to see by what comes last.
        dtype: `"fp32"`, `"bf16-autocast"` (fp32 weights under autocast), or `"bf16"` (weights too).
        optimizer: `"adamw"`, `"sgd"` (with momentum), `"none"`, or a function that makes one.
        training: False for a forward pass without gradients.
        loss_fn: takes the model's output and an int64 target `[batch]` of zeros, by default
            cross-entropy; of a mapping its `labels`, which the model is then not given. None, of a
            mapping: the `loss` in the model's output.
        checkpointing: recompute blocks in the backward (the model's `set_grad_checkpointing`).
        recompute: what of the blocks the backward computes again, as `spt_kernels.recompute` has
            it; left out, what the model does so already.
        device: `"cuda"` accounts for what PyTorch keeps and makes on a card of sm_80 or newer (its
            attention kernels, its autocast, its dropout, blocks of 512 bytes), without one; `"cpu"`
            for what it does on a CPU.
        offload: what of the frozen weights is on the host, as `offload` has it: `"frozen"`,
            `"forward-only"` or `"nothing"`.
        keep_bytes: of these, what stays on the device nevertheless.
        micro_batch: samples to a forward and backward, as `TrainingStep` has it; None for all of
            the batch. Of several parts the last is accounted for, taken to be a full one: it finds
            the gradients of those before it, and the inputs of the whole batch are there.
        accumulate: batches to an update, as `TrainingStep` has it. Of several the last one finds
            the gradients of those before it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, nothing to train, or an input of a shape that the
            model cannot take.
    """
    form = batch_form(batch_shape, loss_fn)
    return Rehearsal(
        model,
        plan,
        method=method,
        budget=budget,
        rank=rank,
        head=head,
        dtype=dtype,
        optimizer=optimizer,
        training=training,
        loss_fn=loss_fn,
        checkpointing=checkpointing,
        recompute=recompute,
        device=device,
        offload=offload,
        keep_bytes=keep_bytes,
        micro_batch=micro_batch,
        accumulate=accumulate,
        image_shape=input_of(form, loss_fn),
    ).at(form)


class Rehearsal:
    """A step on fake tensors, prepared once and rehearsed for any number of batches.

    The arguments are those of `estimate_memory`, which rehearses for one batch alone, and the shape
    of one input, or a batch that is a mapping, by which made-up scores are had; those that are not
    named here are of a `Step`.
    """

    @on_its_own()
    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        *,
        method: str | None = None,
        budget: int | float | None = None,
        rank: int | None = None,
        head: HeadPatterns | None = None,
        image_shape: Sequence[int] | Mapping[str, Tensor],
        **how: Any,
    ) -> None:
        step = Step.of(how)
        model = getattr(model, "_orig_mod", model)  # of a compiled one, which fakes cannot be
        is_planned = plan is not None
        chosen, plan, self._label = _choose(model, plan, method, budget, rank, head, image_shape)
        self._is_made_up = chosen is not None and chosen.is_sensitivity_aware and not is_planned
        self._step = step
        # real tensors (constants that a model makes for itself) are let in, and not counted
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        twin, besides = fake_copy(model, self._fakes, step.weight_dtype)
        self._counts = _Counts.of(model, chosen, plan)
        if chosen is not None:
            tunable = tune(twin, chosen, plan)
            twin = tunable.model
            # some train but a part of what requires a gradient
            self._counts = replace(
                self._counts, trained=tunable.trained + tunable.in_head, head=tunable.in_head
            )
            twin, besides = fake_copy(twin, self._fakes)  # what tuning has added is still real
        elif hasattr(twin, "spt_tuning"):
            # not by attribute, which for some is what a forward reads
            every = dict(twin.named_parameters(remove_duplicate=False))
            head = {name: every[name] for name in twin.spt_tuning.plan.head}
            coarse = [name for name, p in head.items() if p.requires_grad and is_coarse(p)]
            for name in coarse:  # as `apply` does in the dtype that is asked about
                head[name].requires_grad_(False)
                train_whole(twin, name)
            if coarse:
                twin, besides = fake_copy(twin, self._fakes, step.weight_dtype)
        let_fakes_run(twin)
        if step.checkpointing:
            switch_on_checkpointing(twin)
        if step.recompute is not None:
            recompute_parts(twin, step.recompute)
        if step.training and not any(p.requires_grad for p in twin.parameters()):
            raise ValueError(
                "no parameter of the model requires a gradient, there is nothing to train"
            )
        self._twin: nn.Module = twin
        self._besides = besides  # alive as long as the model is
        self._ledger: Ledger = CudaLedger() if step.device == "cuda" else CpuLedger()
        self._optimizer: torch.optim.Optimizer | None = None
        # An optimizer of ours leaves its state and nothing else behind its first step; what
        # another one does in that alone is seen in a second one.
        # Weights are fetched ahead once the order of the blocks is known.
        self._steps = 2 if callable(step.optimizer) or step.offload != "nothing" else 1
        self._on_host: list[StreamedBlock | OffloadedAdamW] = []
        with self._fakes:
            for block in step.offload_weights(twin):
                self._ledger.follow(block.buffers, block.on_host, "weights")
                self._on_host.append(block)
            if step.training:
                self._optimizer = step.make_optimizer(twin)
            if isinstance(self._optimizer, OffloadedAdamW):
                self._ledger.follow(self._optimizer.buffers, self._optimizer.on_host, "optimizer")
                self._on_host.append(self._optimizer)
        if step.device == "cuda" and self._optimizer is not None:
            take_default_path(self._optimizer)
        with self._fakes, self._ledger:
            self._ledger.mark(itertools.chain(tensors_of(twin), besides), "weights")

    def at(self, batch_shape: Sequence[int] | Mapping[str, Tensor]) -> MemoryEstimate:
        """The estimate for one shape of the input; errors are those of `estimate_memory`."""
        return self._observed(self._form(batch_shape), contextlib.nullcontext())

    def with_work(
        self, batch_shape: Sequence[int] | Mapping[str, Tensor]
    ) -> tuple[MemoryEstimate, Work]:
        """The same, and what the step computes and moves."""
        form, counter = self._form(batch_shape), WorkCounter()
        self._leave_behind(form)
        return self._observed(form, counter), counter.work()

    def in_blocks(
        self, batch_shape: Sequence[int] | Mapping[str, Tensor]
    ) -> tuple[MemoryEstimate, list[BlockUse]]:
        """The same, and what of it is each block's, in their order.

        Raises:
            ValueError: the model does not call its blocks once each, one after the other.
        """
        form, counter = self._form(batch_shape), WorkCounter()
        self._leave_behind(form)
        watch = BlockWatch(self._twin, tuple(self.parts()), self._ledger, counter)
        with watch:
            estimate = self._observed(form, counter)
        return estimate, watch.use()

    def recompute(self, line: str) -> Recomputation:
        """From here on the model that is rehearsed computes again what a line of text says.

        Args:
            line: as `RecomputeWords` reads it; empty for nothing.

        Raises:
            ValueError: no such line, or a block that the model has not.
        """
        return recompute_by(self._twin, line) if line else recompute_parts(self._twin, ())

    def take_at_a_time(self, micro_batch: int | None) -> None:
        """From here on the batches that are rehearsed come in parts, as `estimate_memory` has it.

        Raises:
            ValueError: it is no whole number of at least 1.
        """
        self._step = replace(self._step, micro_batch=micro_batch)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """The blocks of the model that is rehearsed, and what of each can be computed again."""
        return parts_of(self._twin)

    def _leave_behind(self, form: BatchForm) -> None:
        """Take a step that makes what a later one finds made, if that is lacking."""
        lacks_state = self._optimizer is not None and not self._optimizer.state
        if lacks_state or self._lacks_gradients(form):
            self._observed(form, contextlib.nullcontext())

    def _form(self, batch_shape: Sequence[int] | Mapping[str, Tensor]) -> BatchForm:
        return batch_form(batch_shape, self._step.loss_fn)

    def _observed(self, form: BatchForm, watched: AbstractContextManager[object]) -> MemoryEstimate:
        step, began = self._step, self._ledger.moment()
        fetched_bytes = self._run(form, watched)
        by_category = self._ledger.peak_of_step(began)
        return MemoryEstimate(
            peak_bytes=sum(by_category.values()),
            by_category=by_category,
            method=self._label,
            batch_shape=shape_of(form),
            micro_batch=step.micro_batch if step.is_in_parts(shape_of(form)[0]) else None,
            dtype=step.dtype,
            training=step.training,
            num_trainable=self._counts.trained,
            checkpointing=step.checkpointing,
            device=step.device,
            made_up_scores=self._is_made_up,
            offload=step.offload,
            host_bytes=sum(held.host_bytes for held in self._on_host),
            fetched_bytes=fetched_bytes,
            num_head=self._counts.head,
            backbone_numel=self._counts.backbone,
        )

    @on_its_own()
    def _run(self, form: BatchForm, watched: AbstractContextManager[object]) -> int:
        """Take steps, the last of them watched; bytes that it fetched from the host."""
        step, ledger = self._step, self._ledger
        adds_gradients = step.adds_gradients(shape_of(form)[0])
        # the gradients of a step before this one are like those of a part before it
        steps = max(self._steps, 2) if self._lacks_gradients(form) else self._steps
        if not adds_gradients:
            self._twin.zero_grad(set_to_none=True)
        with self._fakes, ledger:
            batch = empty_batch(form, step.weight_dtype)
            ledger.mark(tree_iter(batch), "activations")
            part = step.part_of(batch)
            for left in reversed(range(steps)):
                before = self._fetched_bytes()
                with watched if left == 0 else contextlib.nullcontext():
                    if step.training:
                        step.train(
                            self._twin,
                            part,
                            self._optimizer,
                            ledger,
                            adds_gradients=adds_gradients,
                        )
                    else:
                        step.infer(self._twin, part)
            self._steps = 1
        return self._fetched_bytes() - before

    def _lacks_gradients(self, form: BatchForm) -> bool:
        """Whether a step is to add to gradients, and some are not there yet."""
        if not self._step.adds_gradients(shape_of(form)[0]):
            return False
        return any(p.requires_grad and p.grad is None for p in self._twin.parameters())

    def _fetched_bytes(self) -> int:
        return sum(held.fetched_bytes for held in self._on_host)


@dataclass(frozen=True)
class _Counts:
    """Parameters that are trained, of these the head's, and all of the backbone."""

    trained: int
    head: int
    backbone: int

    @classmethod
    def of(cls, model: nn.Module, method: Method | None, plan: Plan | None) -> _Counts:
        """Of a model as it is given; what a method trains is known once it has tuned it."""
        tuning: Any = getattr(model, "spt_tuning", None)
        head = None if method is None else method.head_with(plan)
        head = tuning.plan.head if tuning is not None else head
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        in_head = sum(trained.get(name, 0) for name in head_names(model, head))
        numel = tuning.plan.backbone_numel if tuning is not None else backbone_numel(model, head)
        return cls(sum(trained.values()), in_head, numel)


def _choose(
    model: nn.Module,
    plan: Plan | None,
    method: str | None,
    budget: int | float | None,
    rank: int | None,
    head: HeadPatterns | None,
    image_shape: Sequence[int] | Mapping[str, Tensor],
) -> tuple[Method | None, Plan | None, str]:
    """How to tune the model, None for not at all, by which plan, and what to call it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        check_not_wrapped(model, "account for")
    check_not_offloaded(model, "account for")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(
            f"plan must be a Plan, got {type(plan).__name__}: Plan.load(path) reads a file"
        )
    if method is not None:
        entry_of(method)
    tuning: Any = getattr(model, "spt_tuning", None)
    if tuning is not None and plan is not None:
        raise ValueError("plan: the model is tuned already, by a plan of its own")
    known = plan if plan is not None else getattr(tuning, "plan", None)
    if known is not None:
        whose = "the plan" if plan is not None else "the model, which is tuned already,"
        for name, value in (("budget", budget), ("rank", rank), ("head", head)):
            if value is not None:
                raise ValueError(f"{name}: {whose} has its own, got {value!r}; leave it out")
        if method is not None and not entry_of(method).may_make(known):
            raise ValueError(f"method={method!r}: {whose} trains something else; leave it out")
        label = method or name_of(known)
        return None if plan is None else Method(label), plan, label
    if method is None:
        for name, value in (("budget", budget), ("rank", rank), ("head", head)):
            if value is not None:
                raise ValueError(f"{name}: is of a method, and none was given; got {value!r}")
        return None, None, "as given"
    patterns = None if head is None else as_patterns(head)
    chosen = Method(method, budget, rank, head=patterns)
    return chosen, made_up_plan(model, chosen, image_shape), method

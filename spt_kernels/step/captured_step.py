"""`capture_step`: a training step as two CUDA graphs, one of the backward and one of the update."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import sparse_deltas, write_deltas
from ..layers.autograd.mask_keys import MaskKeys
from ..layers.lookup import settle_doubts
from ..ops.launching import load_for_capture
from ..ops.torch_internals import next_hook_id
from .device_graph import DeviceGraph, refusing_waits
from .held_model import HeldModel
from .held_optimizer import HeldOptimizer
from .refusal import check_arguments, check_no_new_hooks, check_step
from .saved_state import SavedState, host_random_state, is_same_random_state, trained_parameters
from .training_step import TrainingStep

# Of the whole step before it is captured: the first makes state and kernels and counts masks, the
# second reads their keys from memory, and in the last nothing may wait for the card any more
_WARM_UPS = 3


def capture_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Tensor] | Mapping[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad: float | None = None,
    accumulate: int = 1,
    ragged: str = "error",
    allow_hooks: bool = False,
) -> CapturedStep:
    """Capture a training step of any model on a CUDA device, to be launched without its host.

        step = spt.capture_step(model, F.cross_entropy, optimizer, (images, labels))
        for images, labels in loader:
            loss = step(images, labels)
            scheduler.step()

    Of batches that are mappings, as transformers has them, `capture_step(model, None, optimizer,
    batch)` makes a step that is called as `step(**batch)`.

    Nothing is trained by this: the steps that warm up are undone, and the first call of the result
    is the first step. Step for step it computes what `TrainingStep` does with the same arguments;
    dropout draws the same masks. The model is captured in the mode, training or not, that it is in.

    Args:
        model: on a CUDA device, tuned or plain; called with the first tensor of a batch, or as
            `model(**batch)`.
        loss_fn: called with the model's output and the other tensors of a batch; of a mapping with
            its `labels`, which the model is then not given. None, for mappings alone: the `loss` in
            the model's output.
        optimizer: made with `capturable=True`. Its learning rates become tensors on the device,
            which schedulers fill; a number put in their place is noticed, and so is a state dict
            that was loaded. Nothing else of its groups may change.
        batch: tensors like those of every batch to come, or a mapping of names to such.
        autocast: dtype of the forward and the loss, None for that of the model.
        scaler: its scale stays on the device; needs an optimizer that is told of it, as
            `SparseAdamW` and `torch.optim.AdamW(..., fused=True)` are.
        clip_grad: largest norm of the gradient, None for any.
        accumulate: batches, that is calls, to an update.
        ragged: what to do with a batch of another length, as the last one of an epoch: `"error"`,
            or `"eager"` to compute its gradients without a graph.
        allow_hooks: capture a model with hooks, of which a graph keeps what they do on the card,
            also when they are removed. One that is added later is refused by the next call.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument cannot be, or cannot be captured.
        RuntimeError: the step cannot be captured: it waits for the card, or draws random numbers on
            the host. Model, optimizer and generators are then as they were.
    """
    tensors = check_arguments(batch, loss_fn, ragged)
    step = TrainingStep(
        model,
        loss_fn,
        optimizer,
        autocast=autocast,
        scaler=scaler,
        clip_grad=clip_grad,
        accumulate=accumulate,
    )
    device = check_step(step, tensors, allow_hooks=allow_hooks)
    settle_doubts(model)
    with torch.cuda.device(device):
        saved = SavedState(step, device)
        try:
            return CapturedStep(step, tensors, saved, device, ragged)
        except BaseException:
            saved.restore()
            raise


@functools.cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one that captures are made on: cuBLAS keeps a workspace for each, 32 MiB on Hopper."""
    return torch.cuda.Stream(device)


class CapturedStep:
    """A training step that `capture_step` has captured: called with a batch, it gives the loss.

    The loss is a new tensor, detached, of that batch alone; nothing writes to it later. It is not
    waited for. The batch is copied and may be reused.

    Gradients stay where the graph writes them, in `.grad`, until the next call. They, and the
    memory of one step, belong to the graph for as long as it lives; a batch that is computed
    eagerly takes its own.
    """

    def __init__(
        self,
        step: TrainingStep,
        batch: Mapping[int | str, Tensor],
        saved: SavedState,
        device: torch.device,
        ragged: str,
    ) -> None:
        """Use `capture_step`, which checks, and undoes what a failure leaves behind."""
        self._step, self._ragged = step, ragged
        self._inputs = {place: part.detach().clone() for place, part in batch.items()}
        self._size = len(next(iter(self._inputs.values())))
        self._keys = MaskKeys(device)
        self._optimizer = HeldOptimizer(step.optimizer, device)
        self._batches = 0
        stream = _stream_of(device)
        self._warm_up(stream)
        saved.rewind()
        self._backward = DeviceGraph(stream)
        self._loss = self._capture_backward()
        self._grads = [(p, p.grad) for p in trained_parameters(step) if p.grad is not None]
        self._rehearse_update(stream)
        saved.rewind()
        self._update = DeviceGraph(stream, self._backward.pool)
        self._update.capture(self._run_update)
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.hold_state()
        self._model = HeldModel(step.model)
        self._deltas = list(sparse_deltas(step.model).values())
        self._versions = self._versions_now()
        self._captured_at = self._looked_at = next_hook_id()  # of torch's next hook

    def __call__(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """Train on a batch, given as it was captured: tensors in order, or by name; its loss.

        Raises:
            TypeError: these are not the tensors that were captured, by number or by name.
            ValueError: one has another shape, dtype or device than was captured.
            RuntimeError: the model or the optimizer is not what was captured any more, or has a
                hook that it had not then.
        """
        given: dict[int | str, Tensor] = dict(enumerate(batch))
        given.update(named)
        is_ragged = self._check(given)
        difference = self._model.difference()
        if difference is not None:
            raise RuntimeError(f"model: {difference}; put it back, or capture the step anew")
        self._check_hooks()
        self._optimizer.carry_over()
        self._follow_deltas()
        loss = self._loss_of_ragged(given) if is_ragged else self._loss_of(given)
        self._batches += 1
        if self._batches == self._step.accumulate:
            self._batches = 0
            self._update.replay()
            vars(self._step.optimizer)["_opt_called"] = True  # which a scheduler looks for
        return loss

    def _check_hooks(self) -> None:
        """Refuse new hooks; a look at all there are takes a millisecond, so not at each call."""
        if self._looked_at != next_hook_id():
            check_no_new_hooks(self._step, self._captured_at)
            self._looked_at = next_hook_id()

    def _follow_deltas(self) -> None:
        """Write what was changed in place since the last call, which no graph looks at."""
        versions = self._versions_now()
        if versions != self._versions:
            write_deltas(delta for delta in self._deltas if not delta.is_fresh)
            self._versions = versions

    def _versions_now(self) -> list[int]:
        return [delta.delta._version for delta in self._deltas]

    def _loss_of(self, batch: Mapping[int | str, Tensor]) -> Tensor:
        for place, own in self._inputs.items():
            own.copy_(batch[place], non_blocking=True)
        self._keys.refill()
        self._backward.replay()
        return self._loss.clone()

    def _loss_of_ragged(self, batch: Mapping[int | str, Tensor]) -> Tensor:
        """Gradients to where the graph of the update reads them, without the other graph."""
        for param, grad in self._grads:
            param.grad = grad
        if self._step.accumulate == 1:
            self._zero_grads()
        try:
            return self._backward_of(batch)
        except BaseException:  # the next batch then begins another update, as in a TrainingStep
            self._batches = 0
            self._zero_grads()
            raise

    def _backward_of(self, batch: Mapping[int | str, Tensor]) -> Tensor:
        named = {place: part for place, part in batch.items() if isinstance(place, str)}
        return self._step.backward(*(() if named else batch.values()), **named)

    def _check(self, batch: Mapping[int | str, Tensor]) -> bool:
        """Whether a batch is of another length; raises where it is otherwise different."""
        if batch.keys() != self._inputs.keys():
            is_named = any(isinstance(place, str) for place in self._inputs)
            how = " by name, as in step(**batch)" if is_named else ""
            raise TypeError(f"expected {_places(self._inputs)}{how}, got {_places(batch)}")
        is_ragged = False
        for place, own in self._inputs.items():
            given = batch[place]
            if not isinstance(given, Tensor) or (
                given.dtype != own.dtype
                or given.device != own.device
                or given.dim() != own.dim()
                or given.shape[1:] != own.shape[1:]
            ):
                raise ValueError(f"batch[{place!r}]: expected {_kind(own)}, got {_kind(given)}")
            is_ragged |= given.shape != own.shape
        size = len(next(iter(batch.values())))
        if is_ragged and size == 0:
            raise ValueError("batch: expected samples, got none")
        if is_ragged and self._ragged == "error":
            raise ValueError(
                f"batch: captured with {self._size} samples, got {size}: leave "
                'the rest out (drop_last=True), or capture with ragged="eager"'
            )
        return is_ragged

    def _warm_up(self, stream: Any) -> None:
        step = self._step
        if sparse_deltas(step.model):
            load_for_capture(next(iter(self._inputs.values())).device)
        for n in range(_WARM_UPS):
            if n == 1:
                self._keys.allocate()
            self._keys.refill()
            is_last = n == _WARM_UPS - 1
            with _on(stream), refusing_waits() if is_last else contextlib.nullcontext():
                self._forget_grads()
                with self._keys.in_use():
                    self._backward_of(self._inputs)
                step.update()
        trained = [p for group in step.optimizer.param_groups for p in group["params"]]
        if all(param.grad is None for param in trained):
            raise ValueError("optimizer: none of its parameters gets a gradient from this step")

    def _capture_backward(self) -> Tensor:
        if self._step.accumulate == 1:
            self._forget_grads()  # the graph then writes them, where it would add to what is there
        else:
            self._zero_grads()
        gc.collect()  # nothing of the card is to be freed in the middle of a capture
        before = host_random_state()
        with self._keys.in_use():
            loss = self._backward.capture(lambda: self._backward_of(self._inputs))
        if not is_same_random_state(before, host_random_state()):
            raise RuntimeError(
                "the step draws random numbers on the host, which would be the same in every "
                "replay: draw them on the card, or outside of the step and pass them in the batch"
            )
        return loss

    def _rehearse_update(self, stream: Any) -> None:
        """Let the optimizer prepare a step on gradients that lie where they will from now on."""
        with _on(stream), refusing_waits():
            for _ in range(2):
                self._zero_grads()
                self._step.update()
            self._zero_grads()

    def _run_update(self) -> None:
        self._step.update()
        if self._step.accumulate > 1:
            self._zero_grads()

    def _forget_grads(self) -> None:
        for param in trained_parameters(self._step):
            param.grad = None

    def _zero_grads(self) -> None:
        grads = [p.grad for p in trained_parameters(self._step) if p.grad is not None]
        torch._foreach_zero_(grads)


@contextlib.contextmanager
def _on(stream: Any) -> Iterator[None]:
    """Run on a stream what depends on the current one, which then depends on it."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # what undoes a step that failed comes after it, too
        current.wait_stream(stream)


def _places(batch: Mapping[int | str, Tensor]) -> str:
    """What is given, by name if all of it is, to be told."""
    names = [place for place in batch if isinstance(place, str)]
    return ", ".join(sorted(names)) if len(names) == len(batch) > 0 else f"{len(batch)} tensors"


def _kind(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"

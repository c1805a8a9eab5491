"""How a step is taken: in which precision, by which optimizer, with what made again."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_iter

from ..methods.method import did_you_mean
from ..model.call import loss_in, parted
from ..offloading import WHAT, blocks_on_host, offload, why_not_offloaded
from ..offloading.streamed_block import StreamedBlock
from ..recomputation.choice import What
from ..recomputation.conditions import NotRecomputable
from .cuda import run_backward
from .estimate import DEVICES, DTYPES
from .ledger import AnyValue, Ledger

OPTIMIZERS = ("adamw", "sgd", "none")

# What a fake tensor raises where somebody asks for its values
_OF_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
# Code that asks for somebody else: this package's and torch's
_NOT_THE_MODELS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


@dataclass(frozen=True)
class Step:
    """A training step, or a forward alone; the attributes are arguments of `estimate_memory`."""

    dtype: str = "fp32"
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "adamw"
    training: bool = True
    loss_fn: Callable[[Any, Tensor], Tensor] | None = None
    checkpointing: bool = False
    recompute: What | None = None
    device: str = "cuda"
    offload: str = "nothing"
    keep_bytes: int = 0
    micro_batch: int | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        if self.offload not in WHAT:
            raise ValueError(f"offload must be one of {', '.join(WHAT)}, got {self.offload!r}")
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                "optimizer must be 'adamw', 'sgd', 'none' or a function of the model, "
                f"got {self.optimizer!r}"
            )
        for name in ("training", "checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("accumulate",) if self.micro_batch is None else ("accumulate", "micro_batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not self.training and (self.micro_batch, self.accumulate) != (None, 1):
            raise ValueError(
                "micro_batch, accumulate: are for training: inference sums up no gradients"
            )
        if self.checkpointing and not self.training:
            raise ValueError(
                "checkpointing=True is for training: inference keeps nothing that it could "
                "recompute"
            )
        if self.recompute is not None and not self.training:
            raise ValueError(
                f"recompute={self.recompute!r} is for training: inference keeps nothing that it "
                "could compute again"
            )

    @classmethod
    def of(cls, how: Mapping[str, Any]) -> Step:
        """From arguments by name; `TypeError` for one that there is not, whoever was given it."""
        known = [field.name for field in fields(cls)]
        unknown = next((name for name in how if name not in known), None)
        if unknown is not None:
            raise TypeError(
                f"{unknown}: unexpected, a step is told by {', '.join(known)}"
                f"{did_you_mean(unknown, known)}"
            )
        return cls(**how)

    @property
    def weight_dtype(self) -> torch.dtype | None:
        """What the weights are cast to, None for nothing."""
        return torch.bfloat16 if self.dtype == "bf16" else None

    def is_in_parts(self, samples: int) -> bool:
        """Whether a batch of so many is more than is taken at a time."""
        return self.micro_batch is not None and self.micro_batch < samples

    def adds_gradients(self, samples: int) -> bool:
        """Whether the last backward before the update finds gradients, and adds its own to them."""
        return self.accumulate > 1 or self.is_in_parts(samples)

    def part_of(self, batch: Tensor | dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The samples of a batch that are taken at a time, as views of it."""
        if self.micro_batch is None:
            return batch
        if isinstance(batch, Tensor):
            return batch[: self.micro_batch]
        return {name: tensor[: self.micro_batch] for name, tensor in batch.items()}

    def offload_weights(self, model: nn.Module) -> list[StreamedBlock]:
        """Put weights on the host as is asked for; the blocks that they are of."""
        if self.offload == "nothing":
            return []
        if self.keep_bytes == 0 and (lacking := why_not_offloaded(model, self.offload)):
            raise ValueError(f"offload: {lacking}")
        offload(model, self.offload, keep_bytes=self.keep_bytes)
        blocks = blocks_on_host(model)
        if self.dtype == "bf16-autocast":
            for block in blocks:
                block.make_ready(torch.bfloat16)
        return blocks

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer | None:
        """The optimizer of what requires a gradient."""
        trained = [p for p in model.parameters() if p.requires_grad]
        # fused: the step makes no temporary tensors of its own
        if self.optimizer == "adamw":
            return torch.optim.AdamW(trained, lr=1e-3, fused=True)
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)
        made = self.optimizer(model) if callable(self.optimizer) else None
        if made is not None and not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}"
            )
        return made

    def train(
        self,
        model: nn.Module,
        batch: Tensor | dict[str, Tensor],
        optimizer: torch.optim.Optimizer | None,
        ledger: Ledger,
        *,
        adds_gradients: bool = False,
    ) -> None:
        """Forward, backward and optimizer step, told to the ledger one by one.

        Gradients that are there are dropped before, or added to.
        """
        model.train()
        if not adds_gradients:
            model.zero_grad(set_to_none=True)
        ledger.begin_forward()
        with self._autocast():
            loss, _held = self._loss(model, batch)  # as a loop does through the backward
        ledger.end_forward()
        run_backward(loss)
        ledger.mark((parameter.grad for parameter in model.parameters()), "gradients")
        if optimizer is not None:
            with AnyValue():
                optimizer.step()
            ledger.mark(tree_iter(list(optimizer.state.values())), "optimizer")

    def _loss(self, model: nn.Module, batch: Tensor | dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The loss, and what an ordinary loop holds on to besides."""
        loss_fn = self.loss_fn
        if isinstance(batch, Tensor):
            output = forward_of(model, batch)
            target = torch.zeros(batch.shape[0], dtype=torch.int64)
            if loss_fn is None and not isinstance(output, Tensor):
                raise ValueError(
                    f"loss_fn: {type(model).__name__} gives a {type(output).__name__} and no "
                    "tensor of scores: give a loss_fn that takes it, or, of a model with a loss of "
                    "its own, a batch that is a mapping"
                )
            with _values_refused("loss_fn"):
                return (loss_fn or F.cross_entropy)(output, target), (output, target)
        inputs, labels = parted(batch, loss_fn)
        output = forward_of(model, inputs)
        if loss_fn is None:
            return loss_in(output, "batch_shape"), None  # as of `model(**batch).loss`
        with _values_refused("loss_fn"):
            return loss_fn(output, labels), output

    @torch.no_grad()
    def infer(self, model: nn.Module, batch: Tensor | dict[str, Tensor]) -> None:
        """A forward in evaluation mode."""
        model.eval()
        inputs = batch if isinstance(batch, Tensor) else parted(batch, self.loss_fn)[0]
        with self._autocast():
            forward_of(model, inputs)

    def _autocast(self) -> torch.autocast:
        # on fakes of a CPU whatever the device is: `CudaLedger` makes of it what CUDA does
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16-autocast")


def switch_on_checkpointing(model: nn.Module) -> None:
    """Let a model recompute its blocks in the backward, as timm's models know how to.

    Raises:
        ValueError: it does not know how to.
    """
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


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Whatever is in force around it (no_grad, autocast, a default device), a step is not in it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):  # within another one, the step's would keep its casts
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _values_refused(what: str) -> Iterator[None]:
    """Say of code that asks a fake for its values where it does, and what can be done.

    Args:
        what: asks, for the message.

    Raises:
        ValueError: it does.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # of an error that is told here
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    except _OF_VALUES as error:
        raise ValueError(
            f"{what} goes by the values of a tensor ({_asking_line(error)}), and a rehearsal has "
            "shapes alone: turn that off, or measure a step instead "
            "(torch.cuda.max_memory_allocated)"
        ) from error
    finally:
        logger.disabled = was_disabled


def _asking_line(error: BaseException) -> str:
    """Where the last line of the code that asks was."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not each.filename.startswith(_NOT_THE_MODELS)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def forward_of(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Any:
    """What the model makes of a batch, which it takes as it is or by the names of a mapping.

    Raises:
        ValueError: it cannot take one of this shape, or goes by values.
        NotRecomputable: it has a part that cannot be computed again as was asked for.
    """
    kind = type(model).__name__
    with _values_refused(f"model: {kind}"):
        try:
            return model(**batch) if isinstance(batch, Mapping) else model(batch)
        except (NotRecomputable, *_OF_VALUES):
            raise  # that has nothing to do with the batch
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, TypeError) and not isinstance(batch, Mapping):
                raise  # of the model's own, and no matter of a name
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            tuned = f" with {model.spt_method}" if hasattr(model, "spt_method") else ""
            raise ValueError(
                f"batch_shape: {kind}{tuned} cannot take {_told(batch)}: {reason}"
                f"{_of_other_floats(model, batch)}"
            ) from error


def _of_other_floats(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> str:
    """What to do where a model in 16 bits has been given more, else nothing."""
    given = [batch] if isinstance(batch, Tensor) else batch.values()
    narrow = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}
    if not narrow or all(t.dtype in narrow for t in given if t.is_floating_point()):
        return ""
    return f"; its weights are {narrow.pop()}, for which dtype='bf16' gives it inputs of 16 bits"


def _told(batch: Tensor | Mapping[str, Tensor]) -> str:
    if isinstance(batch, Tensor):
        return str(tuple(batch.shape))
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())

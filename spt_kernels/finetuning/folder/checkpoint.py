"""The state of an unfinished training run on disk: all that the rest of the run depends on."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...files.atomic import write_atomically
from ...layers import sparse_deltas

FORMAT_VERSION = 3
_READABLE = (2, 3)  # 2 is without `images_at_once`
# what torch raises for files that are cut, changed, or of something else
_DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)


@dataclass(frozen=True)
class Checkpoint:
    """A run after `epoch` whole epochs, or iterations where these are what it counts.

    Attributes:
        epoch: how many are done.
        tensors: the trained parameters by name, and the statistics of norms that are trained.
        optimizer: its state dict.
        scheduler: its state dict.
        rng: states of every random generator.
        history: the figures of the epochs so far.
        best: the tensors of the epoch that was best on the validation images, `None` without any.
        best_epoch: which one that was, counted from 1.
        images_at_once: to a forward and backward of the last epoch; `None` where that is not known.
    """

    epoch: int
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: dict[str, Any]
    history: list[dict[str, Any]]
    best: dict[str, Tensor] | None = None
    best_epoch: int | None = None
    images_at_once: int | None = None

    @classmethod
    def take(
        cls,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        history: list[dict[str, Any]],
        best: Best | None = None,
        images_at_once: int | None = None,
    ) -> Checkpoint:
        """Of a run as it stands; shares its tensors, so save it before the next step."""
        return cls(
            epoch=epoch,
            tensors=trained_state(model),
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            rng=_rng_states(),
            history=history,
            best=None if best is None else best.tensors,
            best_epoch=None if best is None else best.epoch,
            images_at_once=images_at_once,
        )

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        """Put a prepared model, its optimizer and scheduler, and the generators into this state."""
        put_state(model, self.tensors)
        groups = zip(self.optimizer["param_groups"], optimizer.param_groups, strict=True)
        for saved, group in groups:  # a run with CUDA graphs may go on without, or the reverse
            saved["lr"] = float(saved["lr"])
            saved |= {name: group[name] for name in ("capturable", "fused") if name in group}
        optimizer.load_state_dict(self.optimizer)
        scheduler.load_state_dict(self.scheduler)
        _follow(scheduler)
        _set_rng_states(self.rng)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replace the file at `path` in one step: a kill leaves the old or the new one, whole."""
        buffer = io.BytesIO()
        torch.save({"format": FORMAT_VERSION, **vars(self)}, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        try:
            values = torch.load(Path(path), map_location="cpu", weights_only=True)
            version = values.pop("format")
            read = cls(**values) if version in _READABLE else None
        except _DAMAGE as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{path}: the checkpoint is damaged ({reason})") from error
        if read is None:
            raise ValueError(f"{path}: checkpoint of version {version}, expected {FORMAT_VERSION}")
        return read

    @classmethod
    def begun(cls, path: Path, model: nn.Module) -> Checkpoint | None:
        """What there is to go on from, which fits a prepared model; `None` where there is nothing.

        Raises:
            ValueError: it is damaged, of another version, or of another model.
        """
        if not path.is_file():
            return None
        found = cls.load(path)
        try:
            _check_fits(trained_state(model), found.tensors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return found


@dataclass(frozen=True)
class Best:
    """What was trained as it stood after the epoch that was best on the validation images.

    Attributes:
        epoch: counted from 1.
        tensors: copies on the CPU.
    """

    epoch: int
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, epoch: int, model: nn.Module) -> Best:
        """Of a model as it stands."""
        state = trained_state(model)
        return cls(epoch, {name: t.detach().to("cpu", copy=True) for name, t in state.items()})


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, and the running statistics of norms that are trained whole."""
    state = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    if hasattr(model, "spt_tuning"):  # of whose layers the head's alone are trained whole
        head = {name.rpartition(".")[0] for name in model.spt_tuning.plan.head}  # type: ignore[union-attr]
        buffers = {n: b for n, b in buffers.items() if n.rpartition(".")[0] in head}
    return state | buffers


@torch.no_grad()
def put_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `trained_state` gave into a model that is tuned likewise."""
    own = trained_state(model)
    _check_fits(own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
    for delta in sparse_deltas(model).values():
        delta.write()


def _check_fits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes; `ValueError`."""
    if differing := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"the checkpoint is of another model: {differing[0]}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"the checkpoint is of another model: {name}: expected shape {list(tensor.shape)}, "
                f"got {list(tensors[name].shape)}"
            )


def _follow(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Set the learning rate of the next step: of a run made longer it is not the one saved."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return
    rows = zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    )
    for group, peak, factor in rows:
        lr = float(peak) * factor(scheduler.last_epoch)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _rng_states() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        # as plain values: a checkpoint is read without running any code from it
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def _set_rng_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        # a run may go on where there are fewer cards
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, state, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(state, dtype=np.uint32), position, has_gauss, cached))

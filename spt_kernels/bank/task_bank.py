"""`TaskBank`: the tasks of one base model, used one at a time or several in a batch."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseModelMismatch
from ..task.base_model import unwrap
from ..task.delta import task_of
from ..task.file.format import TaskFile, read
from ..task.fit import Fit
from ..task.intact import tuning_of
from .banked_task import BankedTask, Positions
from .base import Base
from .layout import Layout
from .mixed_batch import MixedBatch, mixing_problem
from .preparation import banked
from .residents import Residents
from .switch import Switch

# Shapes of images that a bank remembers how the model treats: where each image has its own, as many
# would be kept as images come
_MOST_LAYOUTS = 32


class TaskBank:
    """Many tasks over one base model in memory.

    The model stays the object that it is, and a plain one: `use` writes a task into its weights in
    one launch for all of them, and puts its head and its LoRA or Adapter modules on, which run
    unmerged; `use(None)` leaves the base, bit for bit. `run` serves a batch of several tasks.

    Every method may be called from any thread. Whoever calls the model itself does so within
    `using`, or calls `use` and the model from one thread alone.

    Tasks come from files, which are only read. Where `max_tasks` or `max_bytes` are passed, the
    least recently used are dropped from memory, and read again, and checked again, when they are
    next used.

    Args:
        model: plain, in fp32, bf16 or fp16, on any device. Nobody else may change or tune it from
            here on; that it happened is noticed at the next switch.
        max_tasks: most tasks in memory at a time; None for any number. A batch of more has all of
            them while it runs.
        max_bytes: most bytes of memory that tasks take; None for any number. The task in use stays,
            whatever its size, and so do tasks that came from a model, by `add`.

    Raises:
        TypeError: `model` is no module, or a limit no int.
        ValueError: it is tuned, compiled, wrapped or on the meta device, or another bank has a task
            on it; or a limit is below 1.
    """

    def __init__(
        self, model: nn.Module, *, max_tasks: int | None = None, max_bytes: int | None = None
    ) -> None:
        for name, limit in (("max_tasks", max_tasks), ("max_bytes", max_bytes)):
            if not isinstance(limit, (int, type(None))):
                raise TypeError(f"{name} must be an int or None, got {type(limit).__name__}")
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {limit}")
        self._base = Base(model)
        self._lock = threading.RLock()
        self._switch = Switch(self._base)
        self._in_use: str | None = None
        self._returned_to: list[str | None] = []  # by each `using`, the outermost first
        self._residents = Residents(self._hold, max_tasks, max_bytes)
        self._shared: weakref.WeakValueDictionary[tuple[str, bytes], Positions] = (
            weakref.WeakValueDictionary()
        )
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._loader: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"TaskBank({type(self.model).__name__}, tasks={len(self)}, "
                f"in_memory={len(self._residents.in_memory())}, in_use={self._in_use!r})"
            )

    def __len__(self) -> int:
        with self._lock:
            return len(self._residents)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._residents

    def __iter__(self) -> Iterator[str]:
        """Names of all tasks, sorted, dropped ones among them."""
        with self._lock:
            return iter(self._residents.names())

    @property
    def model(self) -> nn.Module:
        """The model, with the task in use on it."""
        return self._base.model

    @property
    def in_use(self) -> str | None:
        """Name of the task that the model has on; None for the base."""
        return self._in_use

    @property
    def in_memory(self) -> list[str]:
        """Names of the tasks in memory, the least recently used first."""
        with self._lock:
            return self._residents.in_memory()

    def nbytes(self, name: str | None = None) -> int:
        """Bytes that tasks take in memory, where the model is.

        Args:
            name: of a task: what it takes by itself, 0 if it is dropped. None for all of them, what
                several share counted once, and the copies of base values that they need.

        Raises:
            KeyError: there is no such task.
        """
        with self._lock:
            if name is None:
                return self._residents.nbytes() + self._base.nbytes
            held = self._residents.entry(name).held
            return 0 if held is None else held.nbytes

    def metadata(self, name: str) -> dict[str, Any]:
        """What the file of a task told when it was read last, as `read_metadata` gives it.

        Raises:
            KeyError: there is no such task.
        """
        with self._lock:
            return dict(self._residents.entry(name).metadata)

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Read a task file; on an error the bank and the model are as before.

        Args:
            name: of the task from here on. One of the same name is replaced.
            path: of a file that `save_delta` wrote. It must stay where it is if there are limits.

        Raises:
            DeltaFormatError: the file is damaged, cut, of a newer format, or holds what must not be
                loaded.
            BaseModelMismatch: it was made for another base model; names the first tensor that
                differs.
            ValueError: the task of this name is in use, or the model cannot take this one.
            TypeError: `name` is no string.
            OSError: the file cannot be read, `FileNotFoundError` among them.
        """
        task = read(path)  # which takes longest, without the lock
        self._put(name, task, path)

    def load_in_background(self, name: str, path: str | os.PathLike[str]) -> Future[None]:
        """`load` in a thread: requests are served meanwhile, and the task is there in the end.

        Returns:
            A future; its `result()` waits, and raises what `load` does. Do not wait for it within
            `using`, which keeps the bank from all other threads.
        """
        with self._lock:
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, thread_name_prefix="spt-task-bank")
            return self._loader.submit(self.load, name, path)

    def add(self, name: str, tuned_model: nn.Module) -> None:
        """Take the task that a tuned model holds, which is not changed, without a file.

        Args:
            name: as `load` has it.
            tuned_model: of the same base.

        Raises:
            BaseModelMismatch: it was tuned from another base model.
            ValueError: it is not tuned, or as `save_delta` refuses it; otherwise as `load`.
        """
        task = task_of(tuned_model)
        classes = list(tuning_of(unwrap(tuned_model)).classes)  # of the file that it came from
        self._put(name, replace(task, metadata={"classes": classes} if classes else {}), None)

    def remove(self, name: str) -> None:
        """Forget a task; its file stays.

        Raises:
            KeyError: there is no such task.
            ValueError: it is in use.
        """
        with self._lock:
            self._residents.entry(name)
            self._refuse_in_use(name, "remove")
            self._residents.remove(name)

    def use(self, name: str | None) -> nn.Module:
        """Put a task on the model in place of the one that is; None for the base, bit for bit.

        What is written is where the two differ; what lies in memory stays where it lies, but for a
        head of another number of classes, which is another module.

        Args:
            name: of the task.

        Returns:
            The model.

        Raises:
            KeyError: there is no such task.
            DeltaFormatError, BaseModelMismatch, OSError: it was dropped, and its file is no longer
                what it was; the model and all other tasks are as before.
            ValueError: the model was changed behind the bank.

        Any other error on the way, as the end of a card's memory, leaves the base in use; where a
        task cannot even be taken off, the next switch does that first.
        """
        with self._lock:
            self._switch_to(name, None if name is None else self._residents.take(name))
            self._residents.drop_beyond_limits(self._needed())
            return self.model

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """`use` for the time of a `with` block, in which no other thread gets at the bank.

        Afterwards the task is in use that was before, which stays in memory meanwhile and can be
        neither removed nor replaced.
        """
        with self._lock, self._returning():
            self._returned_to.append(self._in_use)
            try:
                yield self.use(name)
            finally:
                self._returned_to.pop()

    @torch.no_grad()
    def run(
        self, images: Tensor, tasks: Sequence[str | None], *, together: bool | None = None
    ) -> Tensor | list[Tensor]:
        """The model's outputs for a batch in which each sample has its own task.

        The product of each base weight is taken once for all samples; what the entries, LoRA and
        Adapter modules, biases, norms and head of each sample's task make of it is added. Against
        each task running alone, sums are taken in another order, and in 16 bits each layer rounds
        up to three times more: after the base's product, the entries, and the biases.

        Some layers cannot do that: convolutions and other norms run once for each task, whatever is
        not called as a layer on samples one after another lets each task run alone. That is found
        out once by running the model on two random samples.

        Args:
            images: `[samples, ...]`, floating, on the model's device.
            tasks: the name for each sample; None for the base.
            together: True for one batch, or a refusal; False for each task alone; None for what is
                faster as a rule: one batch on a card, each task alone on a CPU, which photographs
                keep busy one by one. Small images are faster in one batch there too.

        Returns:
            The outputs `[samples, ...]` in the order of the images; where tasks have different
            numbers of classes, a list of one output for each sample.

        Raises:
            KeyError: there is no such task.
            TypeError: `images` or what the model returns is no floating tensor.
            ValueError: not one task for each sample; the model is in training mode; or, where
                `together` is True, why the batch cannot run as one; otherwise as `use`.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
            raise TypeError(f"images must be a floating tensor [samples, ...], got {images!r:.80}")
        if tasks is None or isinstance(tasks, str) or len(tasks) != len(images) or not len(images):
            raise ValueError(
                f"tasks must name one task for each of the {len(images)} images, got {tasks!r:.80}"
            )
        with self._lock:
            if self.model.training:
                raise ValueError(
                    "the model must be in eval mode for a batch of tasks: model.eval()"
                )
            names = list(dict.fromkeys(tasks))
            for name in names:
                if name is not None:
                    self._residents.entry(name)
            order = sorted(range(len(tasks)), key=lambda i: names.index(tasks[i]))
            counts = [sum(task == name for task in tasks) for name in names]
            in_order = images if order == sorted(order) else images[order]
            with self._returning():
                found = self._outputs(in_order, names, counts, together)
            by_sample = [output for outputs in found for output in outputs]
            if len({output.shape for output in by_sample}) > 1:
                placed = dict(zip(order, by_sample, strict=True))
                return [placed[i] for i in range(len(order))]
            joined = found[0] if len(found) == 1 else torch.cat(found)
            if order == sorted(order):
                return joined
            back = sorted(range(len(order)), key=order.__getitem__)
            return joined[back]

    def _outputs(
        self,
        images: Tensor,
        names: Sequence[str | None],
        counts: Sequence[int],
        together: bool | None,
    ) -> list[Tensor]:
        """Outputs of each task, for images in the order of tasks."""
        wanted = images.is_cuda if together is None else together
        if len(names) > 1 and wanted:
            held = [None if n is None else self._residents.take(n) for n in names]
            self._switch.to(None)
            self._base.check_unchanged()  # where nothing was switched, and before `record`
            problem = mixing_problem(self._base, held, self._layout(images))
            if problem is None:
                return MixedBatch(self._base, held, counts).run(images, self._layout(images))
            if together:
                raise ValueError(f"these tasks cannot run in one batch: {problem}")
        found = []
        for name, some in zip(names, images.split(list(counts)), strict=True):
            self._switch.to(None if name is None else self._residents.take(name))
            found.append(self.model(some))
            if not isinstance(found[-1], Tensor):
                raise TypeError(f"the model must return a tensor, got {type(found[-1]).__name__}")
        return found

    @contextlib.contextmanager
    def _returning(self) -> Iterator[None]:
        """Afterwards the task is in use, and on the model, that is now, and the limits hold."""
        before, task = self._in_use, self._switch.task
        try:
            yield
        finally:
            self._switch_to(before, task)
            self._residents.drop_beyond_limits(self._needed())

    def _switch_to(self, name: str | None, task: BankedTask | None) -> None:
        try:
            self._switch.to(task)
        except BaseException:
            if self._switch.task is None:  # half of a task is none
                self._in_use = None
            raise
        self._in_use = name

    def _layout(self, images: Tensor) -> Layout:
        shape = tuple(images.shape[1:])
        layout = self._layouts.pop(shape, None) or Layout.of(self.model, images)
        self._layouts[shape] = layout  # behind those that were used before
        if len(self._layouts) > _MOST_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        return layout

    def _put(self, name: str, task: TaskFile, path: str | os.PathLike[str] | None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r:.80}")
        with self._lock:
            self._refuse_in_use(name, "replace")
            self._residents.put(name, task, path)
            self._residents.drop_beyond_limits({name, *self._needed()})

    def _hold(self, task: TaskFile) -> BankedTask:
        """What is held of a task; `BaseModelMismatch` if it fits another base.

        The model may be running with another task on, and is only read.
        """
        base = self._base
        base.check_unchanged()
        fit = Fit.of(base.structure, base.now, task, None, base.fingerprints)
        if fit.problem is not None:
            raise BaseModelMismatch(fit.problem)
        return banked(task, base, self._switch.leaving or self._switch.task, self._shared)

    def _needed(self) -> set[str]:
        return {name for name in (self._in_use, *self._returned_to) if name is not None}

    def _refuse_in_use(self, name: str, verb: str) -> None:
        if name in self._needed():
            raise ValueError(f"cannot {verb} {name!r}, which is in use: use(None) first")

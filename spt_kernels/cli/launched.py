"""Commands that a launcher such as `torchrun` has started in several processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import OtherProcessFailed

if TYPE_CHECKING:
    from ..distributed import Processes

# What torchrun, and all that starts processes as it does, tells each of them
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> tuple[int, int]:
    """The rank of this process, and how many a launcher has started; (0, 1) without one."""
    if not all(os.environ.get(name) for name in _TOLD):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check_alone(command: str) -> None:
    """Refuse to do in several processes what is done in one.

    Raises:
        ValueError: a launcher has started several, of which this is the first.
        OtherProcessFailed: likewise, and it is another one.
    """
    rank, size = launched()
    if size == 1:
        return
    problem = (
        f"{command} runs in one process, and a launcher has started {size}: start it without one"
    )
    raise OtherProcessFailed(problem) if rank else ValueError(problem)


@contextlib.contextmanager
def sharing(device: str) -> Iterator[Processes]:
    """The processes of the launcher, each on a card of its own where there are cards.

    Args:
        device: what the user asked for: `auto`, `cpu` or `cuda`, but no card by number.

    Raises:
        ValueError: they cannot have it.
    """
    import logging

    import torch
    import torch.distributed as dist

    from ..distributed import Processes

    rank, size = launched()
    if size == 1:
        yield Processes()
        return
    if device.startswith("cuda:"):
        raise ValueError(f"--device: each of {size} processes takes its own card, got {device}")
    on_card = device != "cpu" and torch.cuda.is_available()
    if on_card:
        local, cards = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local >= cards:
            raise ValueError(f"--device: expected a process for each of {cards} cards, got more")
        torch.cuda.set_device(local)
    if rank:
        logging.getLogger("spt_kernels").setLevel(logging.ERROR)  # the first says it
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_card else "gloo")
    yield Processes.of(dist.group.WORLD)
    # not after an error: the others may never come to it, and the launcher ends them
    dist.destroy_process_group()

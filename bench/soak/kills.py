"""Processes that are killed at any moment, saving or training: what is on disk is whole."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import spt_kernels as spt
from spt_kernels.finetuning import finetune

from .small import base_model, job_in, tuned_model


def check_training(count: int, seed: int) -> str:
    """Kill `count` runs of `finetune`, each going on with the one before unless that was through.

    Raises:
        AssertionError: a run that was killed and resumed ends with another task than one that was
            not, or does not end.
    """
    dice, killed, ended = random.Random(seed), 0, 0
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no threads but its own
    try:
        with tempfile.TemporaryDirectory() as place:
            job, folder = job_in(Path(place)), Path(place) / "killed"
            began = time.monotonic()
            finetune(job, Path(place) / "whole")
            takes = time.monotonic() - began
            whole = (Path(place) / "whole" / "task.safetensors").read_bytes()
            while killed < count:
                over = _killed_after(
                    dice.uniform(0.0, 1.2 * takes),
                    lambda: finetune(job, folder, resume=True, checkpoint_seconds=0),
                )
                killed += not over
                if over:
                    ended += 1
                    task = (folder / "task.safetensors").read_bytes()
                    assert task == whole, f"after {killed} kills the task is another one"
                    for file in folder.iterdir():
                        file.unlink()
    finally:
        torch.set_num_threads(before)
    return f"{killed:,} kills, {ended:,} runs that ended with the same bytes all the same"


def _killed_after(seconds: float, act: Callable[[], object]) -> bool:
    """Whether what a process did ended well before it was killed."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "it ended with an error"
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def check(count: int, seed: int) -> str:
    """Kill `count` processes that save one task over another, again and again.

    Raises:
        AssertionError: a file is neither of the two tasks, or something else is left behind.
    """
    dice = random.Random(seed)
    tasks = [tuned_model(n) for n in range(2)]
    seen = [0, 0]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "task.safetensors"
        whole = []
        for task in tasks:
            spt.save_delta(task, path)
            whole.append(path.read_bytes())
        for _ in range(count):
            child = os.fork()
            if not child:
                try:
                    while True:
                        for task in tasks:
                            spt.save_delta(task, path)
                finally:
                    os._exit(1)
            time.sleep(dice.uniform(0.0, 0.08))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), "it ended by itself"
            content = path.read_bytes()
            assert content in whole, "the file is neither the one nor the other"
            seen[whole.index(content)] += 1
        spt.load_delta(base_model(), path)
        left = sorted(file.name for file in Path(place).iterdir() if file != path)
        # what a killed process was writing has a name of its own, and the next save is not misled
        assert all(name.startswith(".") or name.endswith(".tmp") for name in left), left
    return f"{seen[0]:,} and {seen[1]:,} times the one and the other task, whole"

"""`DeviceGraph`: one call's work on a card, to be launched again as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_CANNOT = (
    "a CUDA graph cannot hold this step, as one that waits for the card, copies from memory of the "
    "host, checkpoints its activations, or follows a step whose loss is still alive"
)


class DeviceGraph:
    """A CUDA graph of what one call launches.

    Args:
        stream: to capture on, where the same call has run before.
        pool: of an earlier graph, which always runs to its end before this one.
    """

    def __init__(self, stream: Any, pool: Any = None) -> None:
        self._stream = stream
        self._pool: Any = {} if pool is None else {"pool": pool}
        self._graph = torch.cuda.CUDAGraph()

    @property
    def pool(self) -> Any:
        """Where its tensors lie."""
        return self._graph.pool()

    def capture(self, run: Callable[[], _T]) -> _T:
        """Note what `run` launches, without running it; what it returns is filled by `replay`.

        Raises:
            RuntimeError: a graph cannot hold it. The generator of the card and the current stream
                are as they were before.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            # a thread that pins a loader's batches may go on meanwhile
            self._graph.capture_begin(**self._pool, capture_error_mode="thread_local")
            try:
                result = run()
                self._graph.capture_end()
            except BaseException as error:
                with contextlib.suppress(RuntimeError):  # ending what is broken says so once more
                    self._graph.capture_end()
                _release_generator()
                if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(f"{_CANNOT} ({str(error).splitlines()[0]})") from error
        return result

    def replay(self) -> None:
        """Launch all of it on the current stream."""
        self._graph.replay()


def _release_generator() -> None:
    """Some versions of torch leave a generator that was in a broken capture refusing to draw."""
    device = torch.cuda.current_device()
    try:
        torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


@contextlib.contextmanager
def refusing_waits() -> Iterator[None]:
    """Within it a call that would wait for the card raises where it is made.

    Found before a capture, that costs nothing; in the middle of one it would break it.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise RuntimeError(
            "the step makes the host wait for the card (see the error above for where), which a "
            "CUDA graph cannot hold: leave out .item(), float(), print and branches on values of "
            "tensors, and make no tensor on the card from host memory"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)

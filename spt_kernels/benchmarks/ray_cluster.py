"""Pieces of a benchmark on a cluster, as tasks of Ray that each take a GPU where there are any."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import needed
from .cell import Place
from .piece import Failure, Piece, do_piece
from .schedule import Report

with needed("running on a cluster", "ray"):
    import ray

_AHEAD = 2  # pieces that wait on the cluster for each that runs, so that no place is ever empty


class RayCluster(contextlib.AbstractContextManager["RayCluster"]):
    """Gives pieces to a Ray cluster; where a node is lost, Ray begins its piece again elsewhere.

    The folder of the benchmark must be the same on all nodes, and the images and weights where the
    setting says; each node has this package installed, in the same version.
    """

    def __init__(self, output: Path, address: str, workers: int = 0, threads: int = 1) -> None:
        """Connect to nothing yet.

        Args:
            output: the folder of the benchmark.
            address: of the cluster, as `ray.init` takes it: `auto`, `local`, `HOST:PORT`, `ray://…`.
            workers: processes of each piece that decode images.
            threads: CPUs that each piece takes beside those.
        """
        self._output, self._address, self._workers = output, address, workers
        self._n_cpus = threads + workers
        self._n_gpus = 0
        self._remote: Any = None
        self._is_own = False
        self._under_way: dict[Any, Piece] = {}
        self.n_places = 1

    def __enter__(self) -> RayCluster:
        """Connect, or use the connection that this process has already."""
        self._is_own = not ray.is_initialized()
        if self._is_own:
            try:
                ray.init(address=self._address, log_to_driver=False)
            except (ConnectionError, RuntimeError) as error:
                raise ValueError(f"ray: no cluster at {self._address!r} ({error})") from error
        has = ray.cluster_resources()
        self._n_gpus = 1 if has.get("GPU", 0) >= 1 else 0
        by_cpu = int(has.get("CPU", 0) // self._n_cpus)
        self.n_places = min(by_cpu, int(has["GPU"])) if self._n_gpus else by_cpu
        if not self.n_places:
            raise ValueError(
                f"ray: a piece takes {self._n_cpus} CPUs, the cluster has {has.get('CPU', 0):.0f}"
            )
        self._remote = ray.remote(_do).options(num_cpus=self._n_cpus, num_gpus=self._n_gpus)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop what is under way, and disconnect."""
        for task in self._under_way:
            ray.cancel(task, force=True)
        self._under_way.clear()
        if self._is_own:
            ray.shutdown()

    @property
    def is_free(self) -> bool:
        """Whether another piece should wait for a place."""
        return len(self._under_way) < _AHEAD * self.n_places

    def begin(self, piece: Piece) -> None:
        """Give it to the cluster, which begins it when a place is free."""
        place = Place("cuda" if self._n_gpus else "cpu", self._workers)
        task = self._remote.remote(str(self._output), piece.to_json(), asdict(place))
        self._under_way[task] = piece

    def wait(self) -> Report:
        """What comes of the piece that is over first."""
        (task,), _ = ray.wait(list(self._under_way), num_returns=1)
        piece = self._under_way.pop(task)
        try:
            failure = ray.get(task)
        except ray.exceptions.RayError as error:  # its process or its node died, again and again
            reason = str(error).strip().partition("\n")[0]
            return Report(piece, failure=Failure(f"{type(error).__name__}: {reason}", str(error)))
        return Report(piece, failure=None if failure is None else Failure(**failure))


def _do(output: str, piece: Mapping[str, Any], place: Mapping[str, Any]) -> dict[str, str] | None:
    """Do a piece, in a process of the cluster."""
    failure = do_piece(output, Piece.from_json(piece), Place(**place))
    return None if failure is None else asdict(failure)

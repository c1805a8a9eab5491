"""What a finished run leaves in the repository: a line of JSON in its suite's file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .contender import Run, Suite

FOLDER = Path(__file__).parents[1] / "results" / "evidence"


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        suite: name of the suite.
        setting: digest of what it depends on.
        task: name of the task.
        contender: name of the contender.
        seed: of everything drawn.
        method: of `spt_kernels.methods`.
        budget: that it was given, `None` where the method has none.
        test_accuracy: top-1 in 0 to 1, of the last epoch.
        trained_parameters: beside the head.
        trained_share: of the backbone.
        seconds: of `finetune` on the wall, its measuring and testing included.
        cpu_seconds: of the process; a resumed run's are of its last part.
        machine: processor.
        threads: of torch.
        versions: of what was run.
        commit: of this repository.
    """

    suite: str
    setting: str
    task: str
    contender: str
    seed: int
    method: str
    budget: int | float | None
    test_accuracy: float
    trained_parameters: int
    trained_share: float
    seconds: float
    cpu_seconds: float
    machine: str
    threads: int
    versions: Mapping[str, str]
    commit: str

    @property
    def run(self) -> Run:
        """Which one it is of."""
        return Run(self.task, self.contender, self.seed)


def path_of(suite: Suite, folder: Path = FOLDER) -> Path:
    """The file of a suite's results."""
    return folder / f"{suite.name}.jsonl"


def keep(record: Record, path: Path) -> None:
    """Add a line, in one write, so that processes side by side do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(record)) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(suite: Suite, path: Path) -> dict[Run, Record]:
    """The results of a suite that are there.

    Raises:
        ValueError: a line is damaged, of another setting, of no run of the suite, or there twice.
    """
    found: dict[Run, Record] = {}
    if not path.is_file():
        return found
    runs = frozenset(suite.runs())
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no result of a run ({error})") from error
        what = f"{path}:{number}: {record.task}, {record.contender}, seed {record.seed}"
        if record.run not in runs:
            raise ValueError(f"{what}: the setting has no such run")
        if record.setting != suite.digest_of(record.contender):
            raise ValueError(f"{what}: is of another setting")
        if record.run in found:
            raise ValueError(f"{what}: is there twice")
        found[record.run] = record
    return found

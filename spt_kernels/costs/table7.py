"""The whole cost table: every row in a process of its own, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..methods import entry_of
from .paper import PAPER_ROWS, PaperRow
from .row import CostRow
from .sensitivity_speed import SensitivitySpeed
from .setting import ROWS, CostSetting
from .worker import SENSITIVITY


@dataclass(frozen=True)
class Table7:
    """Every row that could be measured, and why the others could not.

    Attributes:
        setting: of all rows.
        rows: in the order that was asked for.
        missing: method -> reason.
        sensitivity: how fast scores come, None where that was not asked for.
    """

    setting: CostSetting
    rows: tuple[CostRow, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    sensitivity: SensitivitySpeed | None = None

    @property
    def papers(self) -> Mapping[str, PaperRow]:
        """The paper's rows, where this is its model on its images and batch."""
        return PAPER_ROWS if self.setting.is_papers else {}

    def over(self, row: CostRow, rival: str, column: str) -> float | None:
        """A column of `row` over that of another row, None where either is missing."""
        other = next((r for r in self.rows if r.method == rival), None)
        ours, theirs = getattr(row, column), other and getattr(other, column)
        return ours / theirs if ours and theirs else None

    def step_over(self, row: CostRow, rival: str) -> float | None:
        """A step's time over another row's; both were timed in turn with full tuning on a CPU."""
        other = next((r for r in self.rows if r.method == rival), None)
        if other is None or row.step is None or other.step is None:
            return None
        if row.step_over_full is None or other.step_over_full is None:
            return row.step.median_ms / other.step.median_ms
        return row.step_over_full / (1.0 if rival == "full" else other.step_over_full)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the paper's figures beside ours."""
        return {
            "setting": self.setting.to_json(),
            "memory": "measured" if self.setting.on_gpu else "accounted",
            "rows": [asdict(row) for row in self.rows],
            "missing": dict(self.missing),
            "sensitivity": self.sensitivity and asdict(self.sensitivity),
            "paper": {name: asdict(row) for name, row in self.papers.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Table7:
        """The inverse of `to_json`."""
        speed = value["sensitivity"]
        return Table7(
            CostSetting(**value["setting"]),
            tuple(CostRow.from_json(row) for row in value["rows"]),
            value["missing"],
            speed and SensitivitySpeed.from_json(speed),
        )


def run_table7(
    setting: CostSetting,
    methods: Sequence[str] = ROWS,
    *,
    sensitivity: bool = True,
    known: Table7 | None = None,
    told: Callable[[str], None] = lambda _: None,
    kept: Callable[[Table7], object] = lambda _: None,
) -> Table7:
    """Measure one method after the other.

    Args:
        setting: model, sizes, precision, device.
        methods: their names.
        sensitivity: time the scores too, in a table that has them.
        known: a table of this setting, whose rows and speed of scores are not measured again; rows
            that are not among `methods` stay.
        told: called with the name of each row when it is done.
        kept: called with the table so far after each row, so that a time limit loses none.

    Raises:
        ValueError: an unknown method, or a model that cannot be built.
    """
    methods = tuple(dict.fromkeys(methods))
    for name in methods:
        entry_of(name)
    setting.build()  # a wrong name is told once, not by every row
    rows = list(known.rows) if known else []
    speed = known.sensitivity if known else None
    missing: dict[str, str] = {}
    for name in methods:
        if any(row.method == name for row in rows):
            told(name)
            continue
        result = _in_a_process(name, setting)
        if "error" in result:
            missing[name] = result["error"]
        else:
            rows.append(CostRow.from_json(result))
        told(name)
        kept(Table7(setting, tuple(rows), dict(missing), speed))
    if sensitivity and setting.has_scores and speed is None:
        result = _in_a_process(SENSITIVITY, setting)
        if "error" in result:
            missing[SENSITIVITY] = result["error"]
        else:
            speed = SensitivitySpeed.from_json(result)
        told(SENSITIVITY)
    return Table7(setting, tuple(rows), missing, speed)


def _in_a_process(row: str, setting: CostSetting) -> dict[str, Any]:
    """What the process of a row printed; if it failed, the reason as `error`."""
    asked = json.dumps({"row": row, "setting": setting.to_json()})
    done = subprocess.run(
        [sys.executable, "-m", "spt_kernels.costs.worker"],
        input=asked,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": f"its process failed: {last[0]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result

"""Measures one row in a process of its own, so that none inherits another's memory."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from .measure import measure_row
from .sensitivity_speed import measure_sensitivity_speed
from .setting import CostSetting

SENSITIVITY = "sensitivity"


def main() -> None:
    """Read `{"row": …, "setting": …}` from standard input; the last line printed is the result."""
    asked = json.load(sys.stdin)
    setting = CostSetting(**asked["setting"])
    try:
        if asked["row"] == SENSITIVITY:
            result = asdict(measure_sensitivity_speed(setting))
        else:
            result = asdict(measure_row(asked["row"], setting))
    except ValueError as error:  # this method and this architecture do not go together
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The numbers behind a picture, as rows of a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Numbers:
    """What every dataclass of numbers can be written as."""

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per row, all with the same keys."""
        raise NotImplementedError

    def to_json(self: DataclassInstance) -> dict[str, Any]:
        """As JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def csv_of(made: Numbers | Mapping[str, Numbers]) -> str:
    """Rows as comma-separated values under a line of names; what is not known is left empty.

    Args:
        made: numbers; or by name, in which case each row says in a first column, `group`, whose it
            is.
    """
    named = {"": made} if isinstance(made, Numbers) else made
    rows = [
        row if isinstance(made, Numbers) else {"group": name, **row}
        for name, own in named.items()
        for row in own.rows()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

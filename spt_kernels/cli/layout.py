"""Tables and facts laid out for the width of a terminal; no path is broken, no figure cut."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_LEAST_NAMES = 16  # columns that names are left with before figures go into a second table
_LEAST_PROSE = 16
_SPACE = "\ue000"  # stands for a space where no line may end


@dataclass(frozen=True)
class Aligned:
    """Rows in aligned columns: names, figures flush right, and prose at the end where there is any.

    What is wider than the terminal has its names folded and its prose broken; where that is not
    enough, the figures that do not fit come in further tables below, each with the names.

    Attributes:
        columns: their titles.
        rows: their cells, none of which is read as markup.
        title: above the table.
        is_wide: one space between columns, to fit into 80.
        has_prose: whether the last column is prose.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    is_wide: bool = False
    has_prose: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or the tables it has to be."""
        width = options.max_width
        for place, part in enumerate(self._parts(width)):
            if place:
                yield ""
            yield self._table(part, width, self.title if not place else "")

    def _needs(self, column: int) -> int:
        return max(cell_len(row[column]) for row in (self.columns, *self.rows))

    def _edges(self, n_columns: int) -> int:
        """Spaces between columns, and at the sides."""
        return n_columns - 1 if self.is_wide else 2 * n_columns

    def _least(self, column: int) -> int:
        """The width below which a column cannot go."""
        needed = self._needs(column)
        if column == 0:
            return min(needed, _LEAST_NAMES)
        return min(needed, _LEAST_PROSE) if column in self._prose else needed

    @property
    def _prose(self) -> list[int]:
        return [len(self.columns) - 1] if self.has_prose else []

    def _parts(self, width: int) -> list[list[int]]:
        """The columns beside the names of each table."""
        parts: list[list[int]] = [[]]
        for column in range(1, len(self.columns)):
            taken = [0, *parts[-1], column]
            if parts[-1] and sum(map(self._least, taken)) + self._edges(len(taken)) > width:
                parts.append([])
            parts[-1].append(column)
        return parts

    def _table(self, part: Sequence[int], width: int, title: str) -> Table:
        made = Table(title=Text(title) if title else None, title_justify="left", box=None)
        made.title_style = "bold"
        made.pad_edge, made.collapse_padding = not self.is_wide, self.is_wide
        shown = [0, *part]
        widths = self._widths(shown, width)
        for column in shown:
            is_text = column == 0 or column in self._prose
            made.add_column(
                Text(self.columns[column]),
                justify="left" if is_text else "right",
                header_style="dim",
                overflow="fold",
                no_wrap=not is_text,
                width=widths[column],
            )
        for row in self.rows:
            cells = (
                _broken(row[column], widths[column]) if column in self._prose else row[column]
                for column in shown
            )
            made.add_row(*map(Text, cells))
        return made

    def _widths(self, shown: Sequence[int], width: int) -> dict[int, int]:
        """What each column gets: names and prose share what the figures leave."""
        needed = {column: self._needs(column) for column in shown}
        excess = sum(needed.values()) + self._edges(len(shown)) - width
        for column in (*(c for c in self._prose if c in needed), 0):
            given = max(0, min(excess, needed[column] - self._least(column)))
            needed[column] -= given
            excess -= given
        return needed


class Folded(Table):
    """A table of rich in which a word that is wider than its column is folded, and never cut."""

    def add_row(self, *cells: Any, **how: Any) -> None:
        """Add a row of texts, or of several texts to a cell."""
        for cell in cells:
            for part in getattr(cell, "renderables", [cell]):
                if isinstance(part, Text):
                    part.overflow = "fold"
        super().add_row(*cells, **how)


@dataclass(frozen=True)
class Facts:
    """Names and values, a pair per line; what is longer is broken at spaces, a path never."""

    pairs: Sequence[tuple[str, str]]

    def text(self, width: int) -> Text:
        """The lines for a terminal of so many columns; a longer path is left for it to break."""
        margin = max((cell_len(name) for name, _ in self.pairs), default=0) + 3
        lines = Text()
        for place, (name, value) in enumerate(self.pairs):
            parts = _broken(value, max(width - margin, _LEAST_PROSE))
            lines.append("\n" * bool(place))
            lines.append(f" {name}".ljust(margin), style="dim")
            lines.append(parts.replace("\n", "\n" + " " * margin))
        return lines


def _broken(text: str, width: int) -> str:
    parts = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts).replace(_SPACE, " ")


def unbroken(text: Any) -> str:
    """A path, say, as part of a fact or of prose: no line ends within it, spaces or not."""
    return str(text).replace(" ", _SPACE)

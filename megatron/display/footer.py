"""Rows at the bottom of a terminal that are drawn again and again, and lines that stay above them.

Rows are never as wide as the terminal, the cursor stays visible, and no thread draws: whatever ends
the process leaves a sane terminal. A terminal that became narrower has broken the rows: they are
erased as broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


class Footer:
    """The rows of one terminal.

    Args:
        console: draws on the terminal; its width is asked for each time.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._widths: list[int] = []

    def draw(self, rows: Sequence[Text]) -> None:
        """Put rows in the place of those that are there."""
        with self.console:  # one write
            self.erase()
            for number, row in enumerate(rows):
                row.truncate(self.console.width - 1, overflow="ellipsis")
                self._widths.append(row.cell_len)
                end = "\n" if number < len(rows) - 1 else ""
                self.console.print(row, end=end, soft_wrap=True)

    def erase(self) -> None:
        """Leave the cursor where the first row began."""
        from rich.control import Control
        from rich.segment import ControlType as Code

        if not self._widths:
            return
        width = max(1, self.console.width)
        height = sum(max(1, -(-cells // width)) for cells in self._widths)
        clear = (Code.CARRIAGE_RETURN, (Code.ERASE_IN_LINE, 2))
        self.console.control(Control(*clear, *[(Code.CURSOR_UP, 1), *clear[1:]] * (height - 1)))
        self._widths = []

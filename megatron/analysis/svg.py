"""Drawings as SVG: boxes, lines, arrows and words in a few named colours, light and dark.

A drawing stands in a page or is a file of its own; it asks for nothing from elsewhere.
"""

from __future__ import annotations

from html import escape

# name: (fill, edge) on a light page, then on a dark one.
COLOURS = {
    "blue": ("#cfe2f8", "#3a74b4", "#22406a", "#79b0ee"),
    "orange": ("#fbe0c0", "#c8741a", "#5d3c14", "#f0a95a"),
    "green": ("#d2ecd0", "#3f8f45", "#22502a", "#7fcf86"),
    "red": ("#f7d3d4", "#b9464c", "#5c2629", "#ee8d92"),
    "purple": ("#e6d9f1", "#8258a5", "#432d59", "#bf98e0"),
    "teal": ("#cdeae9", "#2b8a86", "#184a48", "#6fcdc8"),
    "grey": ("#eceef1", "#8a929c", "#2b3138", "#79828d"),
}
NAMES = tuple(COLOURS)
INK = ("#1f2328", "#e6edf3")
FAINT = ("#59636e", "#9aa4af")
PAGE = ("#ffffff", "#0d1117")


def _style() -> str:
    def rules(dark: int) -> str:
        ink, faint, page = INK[dark], FAINT[dark], PAGE[dark]
        lines = [
            f".d-ink{{fill:{ink}}}.d-faint{{fill:{faint}}}.d-page{{fill:{page}}}",
            f".d-line{{stroke:{faint};fill:none}}.d-tip{{fill:{faint}}}",
        ]
        for name, pairs in COLOURS.items():
            fill, edge = pairs[2 * dark : 2 * dark + 2]
            lines.append(f".d-{name}{{fill:{fill};stroke:{edge}}}")
        return "".join(lines)

    return f"{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}"


class Drawing:
    """A drawing of `width` x `height` points, the origin in the upper left corner.

    Args:
        width, height: in points.
        title: what it shows, for those who do not see it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str = "grey",
        text: str = "",
        *,
        size: float = 12,
        note: str = "",
    ) -> None:
        """A box with a word in its middle, and a note for the pointer."""
        tip = f"<title>{escape(note)}</title>" if note else ""
        self._parts.append(
            f'<rect class="d-{colour}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{min(4, height / 4):g}">{tip}</rect>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + size * 0.35, text, size=size)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        anchor: str = "middle",
        faint: bool = False,
        bold: bool = False,
    ) -> None:
        """Words on a line whose base is at y; `anchor` is start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text class="d-{"faint" if faint else "ink"}" x="{x:g}" y="{y:g}" '
            f'font-size="{size:g}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(self, *points: tuple[float, float], arrow: bool = False, dashed: bool = False) -> None:
        """A line from point to point, with an arrow's tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#d-tip)"' if arrow else ""
        more += ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<polyline class="d-line" points="{path}"{more}/>')

    def render(self) -> str:
        """The SVG element, with its own background."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} '
                f'{self.height:g}" width="{self.width:g}" role="img" '
                f'aria-label="{escape(self.title)}" style="max-width:100%;height:auto" '
                'font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif">',
                f"<style>{_style()}</style>",
                '<defs><marker id="d-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                'markerHeight="7" orient="auto"><path class="d-tip" d="M0 0L8 4L0 8z"/></marker>'
                "</defs>",
                f'<rect class="d-page" width="{self.width:g}" height="{self.height:g}" rx="6"/>',
                *self._parts,
                "</svg>",
                "",
            ]
        )

"""A flame graph of folded stacks, as text for other tools and as an SVG that a browser shows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

WIDTH, ROW, FONT = 1200, 17, 11
NARROWEST = 0.5  # pixels

Stacks = Mapping[tuple[str, ...], float]  # outermost first -> ms


@dataclass
class Node:
    """A frame: what is in it, and the time of all of that."""

    ms: float = 0.0
    inside: dict[str, Node] = field(default_factory=dict)


def folded_text(stacks: Stacks) -> str:
    """Lines `a;b;c microseconds`, as flamegraph.pl and speedscope read them."""
    lines = (f"{';'.join(stack)} {round(1e3 * ms)}" for stack, ms in sorted(stacks.items()))
    return "\n".join(lines) + "\n"


def tree(stacks: Stacks) -> Node:
    """The stacks as one tree."""
    root = Node()
    for stack, ms in stacks.items():
        node = root
        node.ms += ms
        for name in stack:
            node = node.inside.setdefault(name, Node())
            node.ms += ms
    return root


def svg(stacks: Stacks, title: str) -> str:
    """The picture: outermost frames on top; a frame's time and share are its tooltip."""
    root = tree(stacks)
    boxes: list[str] = []
    depth = _draw(root, root.ms or 1.0, 0.0, 0, boxes)
    height = (depth + 2) * ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'font-family="monospace" font-size="{FONT}">',
            f'<text x="4" y="{ROW - 5}">{escape(title)}: {root.ms:.1f} ms a step</text>',
            *boxes,
            "</svg>\n",
        ]
    )


def _draw(node: Node, whole: float, left: float, depth: int, boxes: list[str]) -> int:
    """Adds the frames inside `node`, which begins at `left` ms; returns the lowest row."""
    lowest = depth
    for name, inner in sorted(node.inside.items(), key=lambda item: -item[1].ms):
        x, width = WIDTH * left / whole, WIDTH * inner.ms / whole
        left += inner.ms
        if width < NARROWEST:
            continue
        y = (depth + 1) * ROW
        hue = zlib.crc32(name.encode()) % 60  # a name has one color everywhere
        shown = escape(name[: int(width / (0.62 * FONT))]) if width > 3 * FONT else ""
        boxes.append(
            f"<g><title>{escape(name)}: {inner.ms:.2f} ms, {inner.ms / whole:.1%}</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}" '
            f'fill="hsl({hue},80%,65%)"/>'
            f'<text x="{x + 2:.1f}" y="{y + ROW - 5}">{shown}</text></g>'
        )
        lowest = max(lowest, _draw(inner, whole, left - inner.ms, depth + 1, boxes))
    return lowest if node.inside else depth

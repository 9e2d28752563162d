"""The ranks of a run drawn: a column per data-parallel replica, a row per pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.analysis.svg import NAMES, Drawing
from megatron.config.layout import Layout

SHOWN = 4  # replicas and stages that are drawn of many
CELLS = 12  # ranks that are drawn of one group


def layout_drawing(layout: Layout, ranks_per_host: int, layers: Sequence[int] = ()) -> str:
    """The SVG.

    Args:
        layout: sizes of the axes.
        ranks_per_host: ranks with the same colour.
        layers: transformer layers of each stage; unknown where it is empty.
    """
    replicas, stages = _shown(layout.dp), _shown(layout.pp)
    inner = layout.tp * layout.sp
    cells = min(inner, CELLS)
    cell = 46 if cells <= 4 else 34
    width, left, top, high = cells * cell + 16, 92, 64, 58
    across = left + len(replicas) * (width + 14) + 8
    drawing = Drawing(max(across, 460.0), top + len(stages) * (high + 22) + 26, f"ranks: {layout}")
    drawing.text(14, 24, f"{layout.world:,} ranks", size=15, anchor="start", bold=True)
    drawing.text(14 + 9 * len(f"{layout.world:,} ranks") + 8, 24, _axes(layout), size=12,
                 anchor="start", faint=True)  # fmt: skip
    for column, replica in enumerate(replicas):
        x = left + column * (width + 14)
        name = "..." if replica is None else f"replica {replica}"
        drawing.text(x + width / 2, top - 14, name, faint=True)
        for row, stage in enumerate(stages):
            y = top + row * (high + 22)
            if replica is None or stage is None:
                drawing.text(x + width / 2, y + high / 2, "...", faint=True)
                continue
            _group(drawing, layout, ranks_per_host, (stage, replica), (x, y, cell, cells))
            if row + 1 < len(stages):
                drawing.line((x + width / 2, y + high + 3), (x + width / 2, y + high + 19),
                             arrow=True)  # fmt: skip
    for row, stage in enumerate(stages):
        middle = top + row * (high + 22) + high / 2
        if stage is not None:
            drawing.text(14, middle, f"stage {stage}", anchor="start", bold=True)
            if stage < len(layers):
                count = f"{layers[stage]} layer{'s' * (layers[stage] > 1)}"
                drawing.text(14, middle + 16, count, anchor="start", faint=True, size=11)
    legend = "a box is a group of TP" + (" x SP" if layout.sp > 1 else "")
    drawing.text(14, drawing.height - 14, f"{legend}; a colour is a host of {ranks_per_host}; "
                 "arrows: activations", anchor="start", faint=True, size=11)  # fmt: skip
    return drawing.render()


def _shown(size: int) -> list[int | None]:
    """All places of an axis, or the first ones, a gap (None) and the last."""
    if size <= SHOWN + 1:
        return [*range(size)]
    return [*range(SHOWN - 1), None, size - 1]


def _axes(layout: Layout) -> str:
    return " x ".join(f"{axis.name} {axis.size}" for axis in layout.axes if axis.size > 1)


def _group(
    drawing: Drawing,
    layout: Layout,
    ranks_per_host: int,
    place: tuple[int, int],
    frame: tuple[float, float, float, int],
) -> None:
    """The ranks of one stage of one replica; `frame` is x, y, the width of a rank and how many."""
    (stage, replica), (x, y, cell, cells) = place, frame
    drawing.box(x, y, cells * cell + 16, 58, "grey")
    for number in range(cells):
        tp_rank, sp_rank = number % layout.tp, number // layout.tp
        cut = number == cells - 1 < layout.tp * layout.sp - 1
        rank = layout.rank(stage, replica, tp_rank, sp_rank)
        host = rank // ranks_per_host
        note = f"rank {rank}: host {host}, {layout.coordinates(rank)}"
        colour = NAMES[host % (len(NAMES) - 1)]  # grey is the group's
        drawing.box(x + 8 + number * cell + 2, y + 10, cell - 4, 38, colour,
                    "..." if cut else str(rank), size=13, note="" if cut else note)  # fmt: skip

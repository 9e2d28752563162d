"""docs/pictures/*.svg, generated: `python3 -m tests.pictures.draw`.

What they show is computed: the ring and the pipeline are played, the bytes are the estimate's, the
ranks are the layout's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.analysis.layout_drawing import layout_drawing
from megatron.analysis.svg import NAMES, Drawing
from megatron.checkpoint.atomic import write_atomically
from megatron.config.layout import Layout
from megatron.plan.memory import memory_per_rank
from tests.config.helpers import configured
from tests.pictures.ring import all_reduce
from tests.pictures.schedule import bubble, in_flight, play

FOLDER = Path(__file__).resolve().parents[2] / "docs/pictures"


def ring() -> str:
    """The steps of an all-reduce over four ranks."""
    ranks, cell, high = 4, 40, 24
    states = all_reduce(ranks)
    panel = ranks * cell + 34
    drawing = Drawing(4 * panel + 30, 356, "all-reduce over a ring of four ranks")
    drawing.text(16, 26, "All-reduce over a ring", size=15, bold=True, anchor="start")
    drawing.text(16, 46, "each rank sends one chunk to the next at each step: 2 (n - 1) steps, "
                 "2 (n - 1) / n of the buffer sent by each rank", faint=True,
                 anchor="start")  # fmt: skip
    for number, state in enumerate(states):
        row, column = divmod(number + (number > 3), 4)
        x, y = 40 + column * panel, 92 + row * 142
        half = "reduce-scatter" if number < ranks else "all-gather"
        drawing.text(x, y - 12, "start" if not number else f"step {number}: {half}",
                     anchor="start", bold=True, size=11)  # fmt: skip
        for rank, chunks in enumerate(state):
            top = y + rank * (high + 2)
            drawing.text(x - 8, top + 16, str(rank), faint=True, anchor="end", size=11)
            for chunk, summed in enumerate(chunks):
                colour = ("grey", "blue", "teal", "green")[len(summed) - 1]
                text = "sum" if len(summed) == ranks else "+".join(map(str, sorted(summed)))
                drawing.box(x + chunk * cell, top, cell - 2, high, colour, text, size=9)
    for rank in range(ranks):  # the ring itself, at the left of the second row
        x, y = 62 + (rank in (1, 2)) * 86, 258 + (rank in (2, 3)) * 56
        drawing.box(x - 16, y - 14, 32, 28, "purple", str(rank))
    for points in (((80, 258), (130, 258)), ((148, 274), (148, 298)),
                   ((130, 314), (80, 314)), ((62, 298), (62, 274))):  # fmt: skip
        drawing.line(*points, arrow=True)
    return drawing.render()


def data_parallel() -> str:
    """One step of four replicas."""
    drawing = Drawing(760, 330, "data parallelism over four replicas")
    drawing.text(16, 26, "Data parallelism", size=15, bold=True, anchor="start")
    drawing.text(16, 46, "each replica has all weights and reads other samples; the mean of the "
                 "gradients keeps them equal", faint=True, anchor="start")  # fmt: skip
    drawing.text(16, 88, "samples", anchor="start", faint=True)
    drawing.text(16, 148, "forward,", anchor="start", faint=True)
    drawing.text(16, 164, "backward", anchor="start", faint=True)
    drawing.text(16, 226, "gradients", anchor="start", faint=True)
    drawing.text(16, 300, "weights", anchor="start", faint=True)
    for rank, colour in enumerate(NAMES[:4]):
        x = 96 + rank * 164
        for part in range(4):
            drawing.box(x + 8 + part * 32, 70, 28, 28, colour, str(4 * rank + part), size=10)
        drawing.line((x + 70, 100), (x + 70, 128), arrow=True)
        drawing.box(x, 130, 140, 42, "grey", f"model, rank {rank}")
        drawing.line((x + 70, 174), (x + 70, 206), arrow=True)
        drawing.line((x + 70, 248), (x + 70, 278), arrow=True)
        drawing.box(x, 280, 140, 32, "grey", "same step")
    drawing.box(96, 208, 632, 38, "purple", "all-reduce: the mean over all samples of the step")
    return drawing.render()


def zero() -> str:
    """Bytes of a rank under each ZeRO stage."""
    ranks, accumulated = 8, 4
    drawing = Drawing(760, 264, "bytes per parameter under ZeRO 0 to 3")
    drawing.text(16, 26, f"ZeRO over {ranks} ranks: bytes of one rank per parameter", size=15,
                 bold=True, anchor="start")  # fmt: skip
    parts = (("weights", "blue", "bf16 weights"), ("gradients", "orange", "fp32 gradients"),
             ("optimizer", "green", "fp32 weights and Adam's two moments"))  # fmt: skip
    x = 16.0
    for _, colour, text in parts:
        drawing.box(x, 42, 14, 14, colour)
        drawing.text(x + 20, 54, text, anchor="start", faint=True)
        x += 44 + 7 * len(text)
    for stage, (name, world) in enumerate(
        (("replicated", 1), ("ZeRO 1", ranks), ("ZeRO 2", ranks), ("ZeRO 3", ranks))
    ):
        run = configured(MODEL_ARCH="7B", VOCAB_SIZE=32000, MICRO_BATCH=1, DTYPE="bf16",
                         GRAD_ACC_STEPS=accumulated, WORLD_SIZE=world,
                         ZERO_STAGE=max(1, stage))  # fmt: skip
        estimate = memory_per_rank(run)._asdict()
        y, x = 78 + stage * 42, 110.0
        drawing.text(16, y + 20, name, anchor="start", bold=True)
        sizes = [estimate[key] / run.parameters for key, _, _ in parts]
        for size, (_, colour, text) in zip(sizes, parts, strict=True):
            shown = f"{size:g}" if (size := round(size, 2)) > 1 else ""
            drawing.box(x, y, size * 28, 30, colour, shown, note=f"{text}: {size:g} bytes")
            x += size * 28
        total = sum(round(size, 2) for size in sizes)
        drawing.text(x + 8, y + 20, f"{total:g}", anchor="start", bold=True)
    drawing.text(16, 252, f"{accumulated} micro-batches per step; beside activations. Under ZeRO 3 "
                 "a layer's weights are gathered while it is computed.", anchor="start",
                 faint=True, size=11)  # fmt: skip
    return drawing.render()


def tensor_parallel() -> str:
    """Two matrices over two ranks, one divided by columns, the next by rows."""
    drawing = Drawing(760, 300, "a column-parallel and a row-parallel matrix")
    drawing.text(16, 26, "Tensor parallelism: first by columns, then by rows", size=15,
                 bold=True, anchor="start")  # fmt: skip
    drawing.text(16, 46, "nothing is sent between the products; one all-reduce after the "
                 "second (backward: one before the first)", faint=True,
                 anchor="start")  # fmt: skip
    for rank, colour in enumerate(("blue", "orange")):
        y = 78 + rank * 108
        drawing.text(16, y + 46, f"rank {rank}", anchor="start", bold=True)
        drawing.box(76, y, 60, 80, "grey", "X")
        drawing.text(150, y + 46, "x", size=14)
        drawing.box(166, y, 60, 80, "grey")
        drawing.box(166 + 30 * rank, y, 30, 80, colour, f"A{rank}")
        drawing.text(240, y + 46, "=", size=14)
        drawing.box(256, y, 30, 80, colour, f"Y{rank}")
        drawing.line((292, y + 40), (352, y + 40), arrow=True)
        drawing.text(322, y + 32, "f", faint=True)
        drawing.box(358, y, 30, 80, colour, "Z" + str(rank))
        drawing.text(402, y + 46, "x", size=14)
        drawing.box(418, y, 60, 80, "grey")
        drawing.box(418, y + 40 * rank, 60, 40, colour, f"B{rank}")
        drawing.text(492, y + 46, "=", size=14)
        drawing.box(508, y, 60, 80, colour, f"part {rank}", size=11)
        drawing.line((572, y + 40), (598, y + 40), arrow=True)
        drawing.box(676, y, 60, 80, "green", "sum")
        drawing.line((646, y + 40), (670, y + 40), arrow=True)
    drawing.box(602, 78, 42, 188, "purple")
    drawing.text(623, 160, "all-", size=11)
    drawing.text(623, 176, "reduce", size=11)
    drawing.text(16, 288, "X, sum: replicated on both ranks. A: q, k, v of its heads; gate, up. "
                 "f: attention of its heads; SwiGLU. B: o; down.", anchor="start", faint=True,
                 size=11)  # fmt: skip
    return drawing.render()


def pipeline() -> str:
    """The same work under both schedules."""
    stages, micro_batches, unit = 4, 8, 20
    drawing = Drawing(760, 336, "GPipe and 1F1B over four stages")
    drawing.text(16, 26, f"{stages} pipeline stages, {micro_batches} micro-batches per step",
                 size=15, bold=True, anchor="start")  # fmt: skip
    for x, colour, text in ((430, "blue", "forward"), (510, "green", "backward"),
                            (600, "grey", "waits: the bubble")):  # fmt: skip
        drawing.box(x, 15, 14, 14, colour)
        drawing.text(x + 20, 27, text, anchor="start", faint=True)
    for place, name in enumerate(("GPipe", "1F1B")):
        works, y = play(name, stages, micro_batches), 66 + place * 138
        end = max(work.end for work in works)
        held = ", ".join(str(in_flight(works, stage)) for stage in range(stages))
        drawing.text(16, y - 8, name, anchor="start", bold=True)
        drawing.text(70, y - 8, f"bubble {bubble(works, stages):.1%}; micro-batches whose "
                     f"activations the stages hold at once: {held}", anchor="start",
                     faint=True)  # fmt: skip
        for stage in range(stages):
            top = y + stage * 26
            drawing.text(16, top + 16, f"stage {stage}", anchor="start", faint=True, size=11)
            drawing.box(70, top, end * unit, 24, "grey")
        for work in works:
            drawing.box(70 + work.start * unit, y + work.stage * 26, (work.end - work.start) * unit,
                        24, "green" if work.backward else "blue", str(work.micro_batch + 1),
                        size=10)  # fmt: skip
    drawing.text(16, 322, "bubble = (p - 1) / (m + p - 1) of p stages and m micro-batches, under "
                 "both; 1F1B holds fewer activations", anchor="start", faint=True,
                 size=11)  # fmt: skip
    return drawing.render()


DRAWINGS: dict[str, Callable[[], str]] = {
    "allreduce": ring,
    "data_parallel": data_parallel,
    "zero": zero,
    "tensor_parallel": tensor_parallel,
    "pipeline": pipeline,
    "layout_3d": lambda: layout_drawing(Layout(tp=2, pp=2, dp=2), 4, (6, 6)),
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        write_atomically(FOLDER / f"{name}.svg", draw())

"""Curves of one or several runs as SVG or PNG, by matplotlib, which is imported where it is used.

An SVG names no font and takes its ink from the page around it, so it is legible on a light page
and on a dark one.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.analysis.plot import SPLITS, Series, evaluations, series
from megatron.analysis.recorded_run import RecordedRun
from megatron.analysis.run_report import skipped_ranges
from megatron.config.errors import ConfigError

MOST_POINTS = 1200  # of a curve; the least and the greatest value of each stretch are kept
SMOOTH = 100  # points from which a curve is drawn thin, under a running mean of it
INK, NO_COLOUR = "#010203", "none"  # the first is the page's own colour in an SVG
COLOURS = ("#3b82c4", "#e08a1e", "#2f9e63", "#d1495b", "#8e63b5", "#1f9e9e", "#a3741a", "#7a828c")

Curves = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: what it shows, with the unit.
        curves: name -> points of a run; the empty name is the run itself.
        logarithmic: whether y may be, where it spans more than a factor of 50.
        stacked: whether the curves add up to a whole.
        loss: whether it shows validation, spikes and skipped ranges.
        several: whether it tells something of several runs only.
        x: what x is.
    """

    title: str
    curves: Callable[[RecordedRun], Curves]
    logarithmic: bool = False
    stacked: bool = False
    loss: bool = False
    several: bool = False
    x: str = "step"


def _of(key: str) -> Callable[[RecordedRun], Curves]:
    return lambda run: {"": series(run.steps, key)}


def _parts(key: str) -> Callable[[RecordedRun], Curves]:
    """Curves of a record's nested numbers."""

    def curves(run: RecordedRun) -> Curves:
        steps = [step for step in run.steps if step.get(key)]
        names = dict.fromkeys(name for step in steps for name in step[key])
        return {
            name: series([{**step, "part": step[key].get(name)} for step in steps], "part")
            for name in names
        }

    return curves


def _phases(run: RecordedRun) -> Curves:
    """The slowest rank's seconds of a step by phase; what is not in one of them is the rest."""
    found = _parts("timers_max")(run)
    if {"forward", "backward"} & found.keys():  # else it would be counted twice
        found.pop("forward-backward", None)
    if not found:
        return {}
    whole = dict(_of("elapsed_s")(run)[""])
    known = {x: math.fsum(dict(curve).get(x, 0.0) for curve in found.values()) for x in whole}
    return {**found, "rest": [(x, max(0.0, y - known[x])) for x, y in whole.items()]}


PANELS: dict[str, Panel] = {
    "loss": Panel("Loss, nats per token", _of("loss"), logarithmic=True, loss=True),
    "grad_norm": Panel("Gradient norm", _of("grad_norm"), logarithmic=True),
    "learning_rate": Panel("Learning rate", _of("learning_rate")),
    "throughput": Panel("Tokens/s, all devices", _of("tokens_per_s")),
    "tflops": Panel("TFLOPS per device (LM)", _of("tflops_lm"), several=True),
    "memory": Panel("Most memory so far, GiB", _of("memory_max_gib")),
    "step_time": Panel("Seconds per step", _of("elapsed_s"), logarithmic=True),
    "phases": Panel("Seconds per step by phase, slowest rank", _phases, stacked=True),
    "corpus_loss": Panel("Loss by corpus, nats per token", _parts("corpus_loss"), logarithmic=True),
    "bubble": Panel("Pipeline bubble", _of("pipeline_bubble")),
    "accuracy": Panel(
        "Accuracy of the next token, validation",
        lambda run: {"": evaluations(run.records, key="accuracy")},
    ),
    "loss_by_tokens": Panel(
        "Loss over tokens",
        lambda run: {
            "": [(s["consumed_tokens"], y) for s in run.steps if math.isfinite(y := s["loss"])]
        },
        logarithmic=True,
        several=True,
        x="tokens",
    ),
    "params_norm": Panel("Norm of the parameters", _of("params_norm")),
}
"""Name of the file -> what it shows; a picture without a curve is left out."""


def metric_panel(metric: str) -> Panel:
    """The picture of a key of the steps' records, or of the loss of a split."""
    if metric in SPLITS:
        return Panel(f"Loss, {metric}", lambda run: {"": evaluations(run.records, metric)})
    return PANELS["loss"] if metric == "loss" else Panel(metric, _of(metric))


def thinned(curve: Series, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points of a curve: of each stretch the least and the greatest."""
    if len(curve) <= most:
        return list(curve)
    width = math.ceil(2 * len(curve) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(curve), width):
        part = curve[start : start + width]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def smoothed(curve: Series) -> list[tuple[float, float]]:
    """Means of means over a 50th of the curve around each point: near points count more."""
    return _means(_means(curve))


def _means(curve: Series) -> list[tuple[float, float]]:
    half = max(1, len(curve) // 100)
    sums = [0.0]
    for _, y in curve:
        sums.append(sums[-1] + y)
    smooth = []
    for place, (x, _) in enumerate(curve):
        first, last = max(0, place - half), min(len(curve), place + half + 1)
        smooth.append((x, (sums[last] - sums[first]) / (last - first)))
    return smooth


class Painter:
    """Draws panels of runs.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(self, runs: Sequence[RecordedRun]) -> None:
        try:
            self._matplotlib = importlib.import_module("matplotlib")
            self._figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ConfigError(f"no pictures: {error} (pip install matplotlib)") from None
        self._runs = runs

    def svgs(self) -> dict[str, str]:
        """Every panel that has something to show, by its name."""
        drawn = {}
        for name, panel in PANELS.items():
            if panel.several and len(self._runs) == 1:
                continue
            figure = self._figure(panel, INK, NO_COLOUR)
            if figure is not None:
                drawn[name] = self._svg(figure, name)
        return drawn

    def save(self, path: Path, panel: Panel) -> bool:
        """Writes a panel on white as .png, .svg or .pdf; whether it has something to show."""
        figure = self._figure(panel, "#1f2328", "white")
        if figure is not None:
            figure.savefig(path, dpi=150)
        return figure is not None

    def _figure(self, panel: Panel, ink: str, page: str) -> Any:
        drawn = [(run, panel.curves(run)) for run in self._runs]
        if not any(any(curves.values()) for _, curves in drawn):
            return None
        style = {key: ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color",
                                      "axes.edgecolor", "axes.titlecolor")}  # fmt: skip
        with self._matplotlib.rc_context(
            {**style, "font.size": 10, "axes.formatter.limits": (-3, 5)}
        ):
            figure = self._figures.Figure(figsize=(5.8, 3.3), layout="constrained", facecolor=page)
            axes = figure.subplots()
            axes.set_facecolor(NO_COLOUR)
            if panel.stacked:
                _stack(axes, drawn)
            else:
                _lines(axes, drawn, panel)
            _dress(axes, panel, ink, len(self._runs) > 1)
        return figure

    def _svg(self, figure: Any, name: str) -> str:
        """The figure as an element of a page: no fonts, no metadata, ink of the page."""
        buffer = io.StringIO()
        with self._matplotlib.rc_context({"svg.fonttype": NO_COLOUR, "svg.hashsalt": name}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(
            r'width="[^"]*pt" height="[^"]*pt"|height="[^"]*pt" width="[^"]*pt"', "", text, count=1
        )
        text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
        return text.replace(INK, "currentColor")


def _lines(axes: Any, drawn: Sequence[tuple[RecordedRun, Curves]], panel: Panel) -> None:
    """Every curve of every run; with many points a thin one under its running mean."""
    colours = itertools.cycle(COLOURS)
    axes.set_xlabel(panel.x, fontsize=9)
    several = len(drawn) > 1
    for run, curves in drawn:
        of_run = next(colours) if "" in curves or not curves else ""
        for part, curve in curves.items():
            if not curve:
                continue
            colour = next(colours) if part else of_run
            label = " ".join(word for word in (_short(run.name) if several else "", part) if word)
            label = label or ("training" if panel.loss else "")
            noisy = len(curve) >= SMOOTH and (panel.loss or panel.logarithmic or bool(part))
            xs, ys = zip(*thinned(curve), strict=True)
            axes.plot(xs, ys, color=colour, linewidth=0.8 if noisy else 1.6,
                      alpha=0.35 if noisy else 1, label=None if noisy else label,
                      marker="." if len(curve) == 1 else None)  # fmt: skip
            if noisy:
                axes.plot(*zip(*thinned(smoothed(curve)), strict=True), color=colour,
                          linewidth=1.7, label=label)  # fmt: skip
            if panel.loss:
                _events(axes, run, curve, colour if several else COLOURS[1], several)


def _events(axes: Any, run: RecordedRun, curve: Series, colour: str, several: bool) -> None:
    """Validation, spikes and skipped ranges beside a run's loss."""
    points = evaluations(run.records)
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, linestyle=":",
                  marker="o", markersize=4.5, label=None if several else "validation")  # fmt: skip
    values = dict(curve)
    spikes = [(r["iteration"], r.get("loss")) for r in run.records if r["event"] == "spike"]
    spikes = [(x, values.get(x, y)) for x, y in spikes if x in values or y is not None]
    if spikes:
        axes.plot(*zip(*spikes, strict=True), color="#d1495b", linestyle="", marker="v",
                  markersize=7, label=None if several else "spike")  # fmt: skip
    for number, (first, last) in enumerate(skipped_ranges(run.records)):
        axes.axvspan(first - 0.5, last + 0.5, color="#7a828c", alpha=0.25, linewidth=0,
                     label=None if number or several else "skipped")  # fmt: skip


def _stack(axes: Any, drawn: Sequence[tuple[RecordedRun, Curves]]) -> None:
    """Parts of a whole: over the steps for one run, a bar for each of several."""
    names = list(dict.fromkeys(name for _, curves in drawn for name in curves))
    if len(drawn) == 1:
        axes.set_xlabel("step", fontsize=9)
        curves = drawn[0][1]
        xs = sorted({x for curve in curves.values() for x, _ in curve})
        width = math.ceil(len(xs) / 300)
        chosen = [xs[place : place + width] for place in range(0, len(xs), width)]
        tables = [dict(curve) for curve in curves.values()]
        rows = [[math.fsum(table.get(x, 0.0) for x in part) / len(part) for part in chosen]
                for table in tables]  # fmt: skip
        axes.stackplot([part[0] for part in chosen], rows, labels=names, colors=COLOURS, alpha=0.85)
        return
    axes.set_yticks(range(len(drawn)), [_short(run.name) for run, _ in drawn])
    axes.invert_yaxis()  # the first run on top
    base = [0.0] * len(drawn)
    for number, name in enumerate(names):
        means = [_mean(curves.get(name, [])) for _, curves in drawn]
        axes.barh(range(len(drawn)), means, left=base, label=name, height=0.5,
                  color=COLOURS[number % len(COLOURS)])  # fmt: skip
        base = [left + mean for left, mean in zip(base, means, strict=True)]


def _short(name: str) -> str:
    """A name that leaves room for the curves: its end tells runs of a sweep apart."""
    return name if len(name) <= 32 else f"...{name[-29:]}"


def _mean(curve: Series) -> float:
    return math.fsum(y for _, y in curve) / len(curve) if curve else 0.0


def _dress(axes: Any, panel: Panel, ink: str, several: bool) -> None:
    """Title, grid, scale and legend."""
    title = panel.title + ("; dots: validation" if panel.loss and several else "")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.grid(color=ink, alpha=0.12, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_alpha(0.4)
    low, high = axes.dataLim.intervaly
    for axis, end in ((axes.xaxis, axes.dataLim.x1), (axes.yaxis, high)):
        if 1000 <= end < 1e6:
            axis.set_major_formatter("{x:,.0f}")
    if axes.get_xlabel():
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.logarithmic and low > 0 and high / low > 50:
        axes.set_yscale("log")
    elif not panel.logarithmic and low >= 0:
        axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    if [label for label in labels if label]:
        # Beside a stack, which leaves no room.
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if panel.stacked else {}
        axes.legend(handles, labels, frameon=False, fontsize=9, **place)

#!/usr/bin/env python3
"""Plots runs in the terminal: `python3 tools/plot.py RUN...`.

RUN is a run's folder, its metrics.jsonl, or a folder of runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.panels import Painter, metric_panel
from megatron.analysis.plot import SPLITS, evaluations, metrics_of, plot, series
from megatron.analysis.recorded_run import RecordedRun, folders
from megatron.config.errors import ConfigError, DataError
from megatron.training.metrics_file import locate, read


def main(arguments: list[str] | None = None) -> int:
    """Prints one plot of all runs; returns the status (2: a wrong argument, 3: damaged)."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--metric", default="loss", help="key of a step's record, e.g. grad_norm, or validation")
    add("--width", type=int, help="columns; default: those of the terminal")
    add("--height", type=int, default=16, help="rows of the drawing")
    add("--png", type=Path, metavar="FILE", help="a .png, .svg or .pdf to write as well")
    chosen = parser.parse_args(arguments)
    try:
        runs = [RecordedRun(str(f), {}, {}, read(locate(f))) for f in folders(chosen.runs)]
        painter = Painter(runs) if chosen.png else None  # a missing library is said before a plot
        print(_drawn(runs, chosen), end="")
        if painter is not None:
            painter.save(chosen.png, metric_panel(chosen.metric))
    except (ConfigError, DataError, ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    return 0


def _drawn(runs: list[RecordedRun], chosen: argparse.Namespace) -> str:
    """The plot in characters.

    Raises:
        ConfigError: no run has the metric.
    """
    metric = chosen.metric
    if metric in SPLITS:
        curves = {run.name: evaluations(run.records, metric) for run in runs}
    else:
        curves = {run.name: series(run.records, metric) for run in runs}
    if not any(curves.values()):
        known = dict.fromkeys(key for run in runs for key in metrics_of(run.records))
        raise ConfigError(
            f"--metric {metric}: no step has it. There are: {', '.join([*known, *SPLITS])}"
        )
    points = {run.name: evaluations(run.records) for run in runs} if metric == "loss" else {}
    return plot(
        curves,
        metric,
        width=chosen.width if chosen.width is not None else _columns(),
        height=chosen.height,
        encoding=sys.stdout.encoding or "ascii",
        points=points,
        colour=_has_colours(),
    )


def _columns() -> int:
    return max(30, shutil.get_terminal_size().columns)


def _has_colours() -> bool:
    """Whether standard output is a terminal whose user wants colours (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return sys.stdout.isatty() and not plain


if __name__ == "__main__":
    raise SystemExit(main())

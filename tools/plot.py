#!/usr/bin/env python3
"""Plots runs in the terminal: `python tools/plot.py RUN...` (a run's folder or a metrics.jsonl)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.plot import plot, save_png, series
from megatron.config.errors import ConfigError, DataError
from megatron.training.metrics_file import locate, read


def main(arguments: list[str] | None = None) -> int:
    """Prints one plot of all runs; returns the status (2: no such file or metric, 3: damaged)."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--metric", default="loss", help="key of a step's record, e.g. grad_norm, tflops_lm")
    add("--width", type=int, default=80, help="columns")
    add("--height", type=int, default=16, help="rows of the drawing")
    add("--png", type=Path, help="file to write as well, where matplotlib is installed")
    chosen = parser.parse_args(arguments)
    try:
        curves = {str(run): series(read(locate(run)), chosen.metric) for run in chosen.runs}
        if not any(curves.values()):
            raise ConfigError(
                f"--metric {chosen.metric}: no step has it; names are the keys of metrics.jsonl"
            )
        frame = {"width": chosen.width, "height": chosen.height}
        encoding = sys.stdout.encoding or "ascii"
        print(plot(curves, chosen.metric, **frame, encoding=encoding), end="")
        if chosen.png and not save_png(chosen.png, curves, chosen.metric, chosen.metric):
            print(f"{chosen.png} is not written: matplotlib is not installed", file=sys.stderr)
    except (ConfigError, DataError, ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

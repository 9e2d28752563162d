#!/usr/bin/env python3
"""Compares runs: `tools/compare_runs.py RUN... [--format md|csv|json|html] [--sort COLUMN]`.

A run is a folder or a metrics.jsonl; a folder of runs stands for all of them. Two runs stand beside
one another, figure by figure; of any other number there is a table with a line each. Rates are
tokens over seconds of the steps that did work, the first three left out. Status: 0; 1
`--assert-equal` does not hold; 2 bad argument; 3 damaged file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.comparing.compared_run import open_run, runs_in
from megatron.analysis.comparing.many import many
from megatron.analysis.comparing.pair import pair
from megatron.analysis.comparing.result_table import FORMS, ordered
from megatron.analysis.comparing.step_gaps import disagreement, step_gaps
from megatron.config.errors import ConfigError, DataError
from megatron.training.metrics_file import locate, read


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; returns the exit status."""
    chosen = _parser().parse_args(arguments)
    try:
        why = _unequal(chosen.runs, chosen.assert_equal)
        paths = runs_in(chosen.runs)
        runs = [open_run(path) for path in paths]
        table = pair(*runs) if len(runs) == 2 and paths == chosen.runs else many(runs)
        if chosen.sort:
            table = ordered(table, chosen.sort, descending=chosen.descending)
    except (ConfigError, DataError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return error.exit_status
    print(FORMS[chosen.format](table), end="")
    if chosen.format == "csv":  # the others hold it themselves
        print(*(f"WARNING: {line}" for line in table.loud), sep="\n", end="", file=sys.stderr)
    if why:
        print(f"compare_runs: not equal: {why}", file=sys.stderr)
    return 1 if why else 0


def _unequal(runs: list[Path], tolerance: float | None) -> str:
    """Why two runs are not equal within `tolerance`; empty where they are, or nobody asks.

    Raises:
        ConfigError: these are not two runs, or it is no tolerance.
        DataError: a file is damaged.
    """
    if tolerance is None:
        return ""
    if not tolerance >= 0:
        raise ConfigError(f"--assert-equal {tolerance}: a tolerance is a number >= 0")
    if len(runs) != 2:
        raise ConfigError("--assert-equal compares two runs")
    a, b = (read(locate(run)) for run in runs)
    return disagreement(step_gaps(a, b), tolerance)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--assert-equal", type=float, metavar="TOL", help="most that loss and grad_norm may differ"
    )
    parser.add_argument("--format", choices=FORMS, default="md")
    parser.add_argument("--sort", metavar="COLUMN", help="order the lines by this column")
    parser.add_argument("--descending", action="store_true", help="with --sort: largest first")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())

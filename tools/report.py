#!/usr/bin/env python3
"""Draws runs: `python3 tools/report.py RUN...` writes report.html, with all curves and tables.

RUN is a run's folder, or a folder of runs. One run: report.html in its folder, and its pictures in
plots/. Several: curves side by side, in the file that -o names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.recorded_run import folders, read_all
from megatron.analysis.report_page import REPORT, write_page
from megatron.config.errors import ConfigError, DataError


def main(arguments: list[str] | None = None) -> int:
    """Writes the page; returns the status (2: no run, no matplotlib; 3: damaged)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page to write")
    chosen = parser.parse_args(arguments)
    try:
        runs = folders(chosen.runs)
        one = runs[0] if len(runs) == 1 else None
        path = chosen.output or (one / REPORT if one else Path(REPORT))
        write_page(read_all(runs), path, one / "plots" if one else None)
    except (ConfigError, DataError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

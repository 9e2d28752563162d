#!/usr/bin/env python3
"""How fast training is here, and where the time goes: a table, with --out also files.

    python3 tools/benchmark.py step --shape 40m --dtype fp32      # ours beside others' programs
    python3 tools/benchmark.py profile --shape 40m                # where a step's time goes
    python3 tools/benchmark.py seed-table [--rehearse]            # the published rows on one device
    python3 tools/benchmark.py scaling                            # 1, 2, 4 ranks of this host
    python3 tools/benchmark.py overlap fp32                       # exposed on a slow cable (root)

Every figure comes with its command, commit, hardware and date. Arms take turns in one run: compare
ratios, never figures of two runs on a machine that others use.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from megatron.config.errors import ConfigError

COMMANDS: Mapping[str, tuple[str, str]] = {
    "overlap": ("tools.benchmarks.overlap", "exposed communication, on a cable of 1 Gbit/s"),
    "step": ("tools.benchmarks.step", "our training step against other programs'"),
    "profile": ("tools.benchmarks.step_profile", "where a step's time goes, and a flame graph"),
    "seed-table": ("tools.benchmarks.seed_table", "published rows of small models, on one device"),
    "scaling": ("tools.benchmarks.scaling", "the same model on 1, 2, 4 ranks of this host"),
}
"""Name -> module with add_arguments(parser) and main(options), and one line of help."""


def main(argv: Sequence[str]) -> int:
    """Runs a subcommand; returns the exit status."""
    name = next(iter(argv), "")
    if name not in COMMANDS:
        print(__doc__, *(f"{name:12}{text}" for name, (_, text) in COMMANDS.items()), sep="\n")
        return 0 if name in ("-h", "--help") else 2
    module, text = COMMANDS[name]
    command: Any = importlib.import_module(module)
    parser = argparse.ArgumentParser(f"benchmark.py {name}", description=text)
    command.add_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder for the table, as .md and .json")
    try:
        status: int = command.main(parser.parse_args(argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

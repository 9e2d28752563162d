#!/usr/bin/env python3
"""Trains a grid of settings, one row after the other, and prints one table.

    tools/sweep.py NLAYERS=4,8 GAS=1,2,4 [--name NAME] [--minutes M] [--dry-run] [-- --flag value]
    tools/sweep.py --rows FILE          # names in the first line, then a line of values a row

What is the same in all rows is set as for train_alcf.sh. A row is a run, runs/NAME/ROW; one that
fails, runs out of memory or hangs stays in the table, with its status. Started again, the sweep
goes on where it was: rows that have ended are kept, --retry runs the failed ones again. Status: 0
all rows finished; 1 one did not; 2 wrong setting.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.comparing.compared_run import ROW_FILE, open_run
from megatron.analysis.comparing.ending import FINISHED, of_status
from megatron.analysis.comparing.many import many
from megatron.analysis.comparing.result_table import FORMS
from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import by_variable
from tools.sweeping.sweep_rows import (
    NAMED_HERE,
    Row,
    from_file,
    grid,
    named,
    require_known,
    require_same,
)

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 120.0  # for a last save, once a row's time is over
TAIL = 30000
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asks the sweep to stop: the row is asked to, and is not over."""

    def __init__(self, number: int) -> None:
        """`number` is the signal's."""
        super().__init__(number)
        self.number = signal.Signals(number)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the rows; returns the exit status."""
    place = argv.index("--") if "--" in argv else len(argv)
    chosen, flags = _parser().parse_args(argv[:place]), argv[place + 1 :]
    try:
        given = from_file(chosen.rows) if chosen.rows else grid(chosen.settings)
        names = list(given[0])
        root = Path(chosen.runs).absolute() / (chosen.name or f"sweep-{'-'.join(names)}")
        rows = [Row(row, root / named(row), flags) for row in given]
        require_known(names)
        if chosen.dry_run:
            for row in rows:
                words = [f"{k}={shlex.quote(v)}" for k, v in row.environment.items()]
                print(" ".join([*words, shlex.join(row.words)]))
            return 0
        common = _common(environ, names, flags)
        require_same(rows, common)
        for number, row in enumerate(rows, 1):
            run_row(row, f"[{number}/{len(rows)}]", common, chosen, environ)
        return conclude(rows, root, chosen.format)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except Interrupted as error:
        print("stopped; the same command goes on with this row", file=sys.stderr)
        return 128 + error.number


def listen() -> None:
    """Turn the signals that stop a program into `Interrupted`; nohup's SIGHUP stops none."""

    def interrupt(number: int, frame: object) -> None:
        del frame
        raise Interrupted(number)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def run_row(
    row: Row,
    place: str,
    common: Mapping[str, str],
    chosen: argparse.Namespace,
    environ: Mapping[str, str],
) -> None:
    """Trains a row to its end, unless it has ended before."""
    if row.ended and not (chosen.retry and row.ended["status"]):
        print(f"{place} {row.text}: {row.ended['why']}, before")
        return
    print(f"{place} {row.text} ...", flush=True)
    row.folder.parent.mkdir(parents=True, exist_ok=True)
    log, began = row.folder.parent / f"{row.folder.name}.log", time.monotonic()
    status, late = _run(row, log, chosen.minutes, environ)
    said = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
    seconds = round(time.monotonic() - began, 1)
    why = f"stopped after {chosen.minutes:g} min" if late else of_status(status, said)
    about = {"variables": dict(row.variables), "common": dict(common), "why": why}
    row.folder.mkdir(exist_ok=True)
    record = about | {"status": status, "seconds": seconds}
    write_atomically(row.folder / ROW_FILE, json.dumps(record, indent=2) + "\n")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    print(f"{place} {row.text}: {why}, {seconds:.0f} s" + (f"; see {log}" if status else ""))
    if errors:
        print(f"    {errors[-1]}")


def _run(
    row: Row, log: Path, minutes: float | None, environ: Mapping[str, str]
) -> tuple[int, bool]:
    """Exit status of a row, and whether its time was over."""
    process = None
    with log.open("wb") as file:
        try:
            with _signals_wait():  # else a row that has just begun would have no one to end it
                process = subprocess.Popen(
                    row.words,
                    cwd=ROOT,
                    env={**environ, **row.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            return _status(process.wait(60 * minutes if minutes else None)), False
        except subprocess.TimeoutExpired:
            return _end(process, signal.SIGTERM), True
        except Interrupted as error:
            if process:
                _end(process, error.number)
            raise


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals of `STOPPING` that come meanwhile come at the end."""
    came: list[int] = []
    former = {one: signal.signal(one, lambda number, _: came.append(number)) for one in STOPPING}
    try:
        yield
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)
    for number in came:
        signal.raise_signal(number)


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Ask a run to save and stop; end all its processes where it does not. Returns its status.

    As Ctrl-C on a terminal, the signal is for the group: a shell that waits for a program drops it.
    """
    os.killpg(process.pid, number)
    try:
        return _status(process.wait(GRACE_S)) or 128 + number
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks die with their launcher
        return _status(process.wait())


def _status(code: int) -> int:
    return 128 - code if code < 0 else code


def conclude(rows: Sequence[Row], root: Path, form: str) -> int:
    """Prints the table, writes it as a page, and returns the exit status."""
    table = many([open_run(row.folder) for row in rows])
    print()
    print(FORMS[form](table), end="")
    write_atomically(root / "table.html", FORMS["html"](table))
    print(f"\nas a page: {root / 'table.html'}", file=sys.stderr)
    failed = [row for row in rows if row.ended.get("why") != FINISHED]
    if failed:
        print(f"{len(failed)} of {len(rows)} rows did not finish; --retry runs them again",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


def _common(
    environ: Mapping[str, str], names: Sequence[str], flags: Sequence[str]
) -> dict[str, str]:
    """The settings of all rows, as they are given."""
    known = by_variable().keys() - {*names, *NAMED_HERE, "TRAIN_ITERS"}
    found = {name: environ[name] for name in sorted(known & environ.keys())}
    return found | ({"flags": shlex.join(flags)} if flags else {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=a,b", help="values of a variable")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows instead of a grid")
    parser.add_argument("--name", help="folder of the sweep; default: sweep- and the names")
    parser.add_argument("--runs", default="runs", help="where that folder is; default: runs")
    parser.add_argument("--minutes", type=float, metavar="M", help="most that a row may take")
    parser.add_argument("--retry", action="store_true", help="run failed rows again")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.add_argument("--format", choices=FORMS, default="md", help="of the table")
    return parser


if __name__ == "__main__":
    listen()
    raise SystemExit(main(sys.argv[1:], os.environ))

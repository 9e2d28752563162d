"""`scaling`: the same model on 1, 2, 4 ... ranks of this host, through train_alcf.sh.

Weak: every rank keeps its samples. Strong: the samples of a step are fixed. Ranks beyond the cores
of a host without accelerators share them, which is said.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tools.benchmarks import entry
from tools.benchmarks.record import Record, spread
from tools.benchmarks.workload import shape_variables

COLUMNS = ("scaling", "ranks", "samples a step", "step s, median (range)", "tokens/s", "efficiency")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--shape", default="40m", help="a name, or VARIABLE=value,...")
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp32"))
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=2, help="each of one run per row")
    parser.add_argument("--steps", type=int, default=entry.STEPS, help="of a run")
    parser.add_argument("--minutes", type=float, default=5.0, help="of one run at most")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="VARIABLE=value", help="such as ZERO_STAGE=2, TP=2"
    )


def main(options: argparse.Namespace) -> int:
    """Runs all rows, round by round; 1 where one failed."""
    more, unknown = entry.settings(options.set)
    if unknown:
        print(f"error: {', '.join(unknown)} is no option")
        return 2
    shape = {**shape_variables(options.shape), "DTYPE": options.dtype, **more}
    rows = plan(options.ranks, int(shape.get("MICRO_BATCH", "1")))
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    failed = ""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        data = entry.numbers(Path(folder, "numbers"), int(shape["VOCAB_SIZE"]), 1 << 20)
        for _ in range(options.rounds):
            for key, own in rows.items():
                short = entry.train({**shape, **own}, data, 60 * options.minutes, options.steps)
                if short.seconds is None:
                    failed = f"{key[0]} scaling, {key[1]} ranks: {short.outcome}"
                    print(f"{failed}\n{short.log[-2000:]}", file=sys.stderr)
                else:
                    seconds[key].append(short.seconds)
    report(rows, seconds, shape, failed, options).write(options.out)
    return int(bool(failed))


def plan(ranks: list[int], micro_batch: int) -> dict[tuple[str, int], dict[str, str]]:
    """(kind, ranks) -> variables of a run; strong scaling needs samples for the most ranks."""
    most = max(ranks)
    rows = {}
    for count in ranks:
        world = {"WORLD_SIZE": str(count), "NGPU_PER_HOST": str(count)}
        rows["weak", count] = {**world, "GLOBAL_BATCH": str(micro_batch * count)}
    for count in ranks:
        world = {"WORLD_SIZE": str(count), "NGPU_PER_HOST": str(count)}
        rows["strong", count] = {**world, "GLOBAL_BATCH": str(micro_batch * most)}
    return rows


def report(
    rows: Mapping[tuple[str, int], Mapping[str, str]],
    seconds: Mapping[tuple[str, int], list[float]],
    shape: Mapping[str, str],
    failed: str,
    options: argparse.Namespace,
) -> Record:
    """The table; efficiency is the rate of a rank over that of the fewest ranks."""
    record = Record(
        f"scaling-{options.dtype}", f"Scaling: {options.shape}, {options.dtype}", COLUMNS
    )
    base: dict[str, float] = {}
    for (kind, ranks), own in rows.items():
        times = seconds.get((kind, ranks))
        if not times:
            record.rows.append((kind, str(ranks), own["GLOBAL_BATCH"], "failed", "", ""))
            continue
        samples = int(own["GLOBAL_BATCH"])
        rate = samples * int(shape["SEQ"]) / statistics.median(times)
        base.setdefault(kind, rate / ranks)
        record.rows.append(
            (
                kind,
                str(ranks),
                str(samples),
                spread(times, 3),
                f"{rate:,.0f}",
                f"{rate / ranks / base[kind]:.0%}",
            )
        )
    record.data = {
        "shape": dict(shape),
        "rows": [
            {"kind": kind, "ranks": ranks, "seconds": seconds.get((kind, ranks), [])}
            for kind, ranks in rows
        ],
    }
    threads = os.environ.get("OMP_NUM_THREADS", "the launcher's choice")
    record.notes = [f"OMP_NUM_THREADS: {threads}; ranks beyond the cores share them"]
    if failed:
        record.notes.append(f"failed: {failed}")
    return record

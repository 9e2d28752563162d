"""`seed-table`: the published rows of AuroraGPT-v1 (Small), on one device of this machine.

The published figures are per tile of an Intel Data Center GPU Max 1550, 24 of them, GBS 48. A row
that does not fit in memory stays a row. The rows that say most come first, in case time runs out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tools.benchmarks import entry
from tools.benchmarks.record import Record

PUBLISHED: Mapping[str, int] = {
    "llama3-3B:4": 8018,
    "llama3-3B:6": 6786,
    "llama3-3B:8": 5874,
    "llama3-3B:10": 5179,
    "llama3-3B:12": 4646,
    "llama3-3B:14": 4202,
    "smollm3-3B:8": 7316,
    "smollm3-3B:10": 6448,
    "smollm3-3B:12": 5780,
    "smollm3-3B:14": 5238,
    "smollm3-3B:16": 4734,
    "smollm3-3B:18": 4363,
}
"""MODEL_ARCH:NLAYERS -> tokens per second of a tile."""

ROWS = (
    "llama3-3B:14", "smollm3-3B:18", "llama3-3B:28", "smollm3-3B:36", "llama3-3B:4",
    "smollm3-3B:8", "llama3-3B:16", "smollm3-3B:20", "llama3-3B:8", "smollm3-3B:12",
    "llama3-3B:12", "smollm3-3B:16", "llama3-3B:10", "smollm3-3B:14", "llama3-3B:6",
    "smollm3-3B:10",
)  # fmt: skip
"""The published ones, what did not fit there (16 and 20 layers), and the whole models (28, 36)."""

SETTINGS = {
    "GRAD_ACC_STEPS": "2",
    "MICRO_BATCH": "1",
    "USE_ACTIVATION_CHECKPOINTING": "0",
    "ZERO_STAGE": "0",
    "DTYPE": "bf16",
    "VOCAB_SIZE": "256000",  # gemma's, as in the published runs
    "WORLD_SIZE": "1",
    "NGPU_PER_HOST": "1",
}
SMALL = {
    "HIDDEN": "64",
    "HEADS": "4",
    "NUM_KV_HEAD": "2",
    "FFN_HIDDEN_SIZE": "128",
    "SEQ": "64",
    "VOCAB_SIZE": "512",
    "DTYPE": "fp32",
}
"""Of a rehearsal: every row runs, on any machine, and no figure means anything."""

COLUMNS = (
    "model", "layers", "parameters, B", "tokens/s", "TFLOPS LM", "DS", "causal", "MFU",
    "peak GiB", "of the tile", "outcome",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ARCH:LAYERS")
    parser.add_argument("--rehearse", action="store_true", help="small shapes, two rows")
    parser.add_argument("--minutes", type=float, default=60.0, help="no row is begun later")
    parser.add_argument("--row-minutes", type=float, default=5.0, help="of one row at most")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="VARIABLE=value", help="further settings, as FP8=1"
    )
    parser.add_argument("--name", default="seed-table", help="of the files written to --out")


def main(options: argparse.Namespace) -> int:
    """Runs the rows; 1 where one failed by anything but memory."""
    more, unknown = entry.settings(options.set)
    if unknown:
        print(f"skipped: {', '.join(unknown)} is no option of this version")
        return 0
    variables = {**SETTINGS, **(SMALL if options.rehearse else {}), **more}
    rows = options.rows[:2] if options.rehearse else options.rows
    began = time.monotonic()
    found: dict[str, entry.Short] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        vocab_size = int(variables["VOCAB_SIZE"])
        data = entry.numbers(Path(folder, "numbers"), vocab_size, 60 * 8192)
        for row in rows:
            if time.monotonic() - began > 60 * options.minutes:
                found[row] = entry.Short("not reached in time")
                continue
            arch, _, layers = row.partition(":")
            own = {"MODEL_ARCH": arch, "NLAYERS": layers}
            found[row] = entry.train({**own, **variables}, data, 60 * options.row_minutes)
            print(f"{row}: {found[row].outcome}", file=sys.stderr, flush=True)
            if found[row].outcome not in ("ok", "out of memory"):
                print(found[row].log[-3000:], file=sys.stderr)
    report(found, variables, options.name).write(options.out)
    fine = ("ok", "out of memory", "not reached in time")
    return int(any(short.outcome not in fine for short in found.values()))


def report(found: Mapping[str, entry.Short], variables: Mapping[str, str], name: str) -> Record:
    """The table, in the order of the published one."""
    from megatron.config.resolve import Site, resolve

    record = Record(name, "AuroraGPT-v1 (Small), one device", COLUMNS)
    data = []
    for row in sorted(found, key=lambda text: (text.split(":")[0], int(text.split(":")[1]))):
        arch, _, layers = row.partition(":")
        own = {"MODEL_ARCH": arch, "NLAYERS": layers, "DRY_RUN": "1", **variables}
        run = resolve({**entry.ALWAYS, "TRAIN_ITERS": "10", **own}, [], Site()).run
        parameters = run.architecture.parameters(run.model)
        short = found[row]
        tokens, tile = short.median("tokens_per_gpu_per_s"), PUBLISHED.get(row)
        figures: dict[str, float | None] = {
            "tokens_per_s": tokens,
            "tflops_lm": short.median("tflops_lm"),
            "tflops_ds": short.median("tflops_ds"),
            "tflops_causal": short.median("tflops_causal"),
            "mfu": short.median("mfu"),
            "peak_gib": short.peak_gib,
            "of_the_tile": tokens / tile if tokens and tile else None,
        }
        forms = ("{:,.0f}", "{:.1f}", "{:.1f}", "{:.1f}", "{:.1%}", "{:.1f}", "{:.2f}")
        cells = [
            "" if value is None else form.format(value)
            for form, value in zip(forms, figures.values(), strict=True)
        ]
        record.rows.append((arch, layers, f"{parameters / 1e9:.2f}", *cells, short.outcome))
        times = [step["elapsed_s"] for step in short.steps]
        data.append({"row": row, "parameters": parameters, "outcome": short.outcome,
                     **figures, "seconds": times})  # fmt: skip
    record.data = {"settings": dict(variables), "rows": data}
    record.notes = [
        "medians of the steps after the warm-up; MFU by the LM count; `of the tile`: tokens/s over "
        "the published figure of one tile",
        settings_text(variables),
    ]
    return record


def settings_text(variables: Mapping[str, str]) -> str:
    """The variables, as a command line has them."""
    return "`" + " ".join(f"{name}={value}" for name, value in variables.items()) + "`"

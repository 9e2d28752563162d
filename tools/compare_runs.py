#!/usr/bin/env python3
"""Compares runs: `tools/compare_runs.py A B [--assert-equal TOL] [--format md|csv|json]`.

They are run folders or metrics.jsonl files; of three or more there is a table, one line a run.
Rates are tokens over seconds of the steps that did work. Status: 0; 1 `--assert-equal` does not
hold; 2 bad argument; 3 damaged file.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.summary import flatten, throughput, training_steps
from megatron.config.errors import ConfigError, DataError
from megatron.training.metrics_file import locate, read

COMPARED = ("loss", "grad_norm")
RATES = (
    "steps_per_s", "steps_per_gpu_per_s", "tokens_per_s", "tokens_per_gpu_per_s", "tflops_lm",
)  # fmt: skip

Records = Sequence[Mapping[str, Any]]


def gap(a: float | None, b: float | None) -> float:
    """Absolute difference: 0 where both are NaN or absent, infinite where only one is."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    distance = abs(a - b)
    return math.inf if math.isnan(distance) else distance


def compare(
    a: Records, b: Records, run_a: Mapping[str, Any], run_b: Mapping[str, Any]
) -> dict[str, Any]:
    """All that is printed about two runs, as plain values.

    Args:
        a, b: records of the runs.
        run_a, run_b: their run.json; empty where there is none.
    """
    steps_a = {record["iteration"]: record for record in training_steps(a)}
    steps_b = {record["iteration"]: record for record in training_steps(b)}
    matched = sorted(steps_a.keys() & steps_b.keys())
    found: dict[str, Any] = {
        "matched_iterations": len(matched),
        "only_in_a": len(steps_a.keys() - steps_b.keys()),
        "only_in_b": len(steps_b.keys() - steps_a.keys()),
    }
    for name in COMPARED:
        gaps = {i: gap(steps_a[i].get(name), steps_b[i].get(name)) for i in matched}
        found[f"max_{name}_difference"] = max(gaps.values(), default=0.0)
        found[f"first_iteration_with_different_{name}"] = next(
            (i for i in matched if gaps[i] > 0), None
        )
    rate_a, rate_b = throughput(a), throughput(b)
    for name in RATES:
        value_a, value_b = getattr(rate_a, name, None), getattr(rate_b, name, None)
        found |= {f"{name}_a": value_a, f"{name}_b": value_b}
        found[f"{name}_ratio_b_to_a"] = value_b / value_a if value_a and value_b else None
    flat_a, flat_b = flatten(run_a), flatten(run_b)
    found["configuration"] = {
        key: [flat_a.get(key), flat_b.get(key)]
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key) != flat_b.get(key) and not key.startswith("sources")
    }
    return found


def disagreement(found: Mapping[str, Any], tolerance: float) -> str:
    """Why the runs are not equal within `tolerance`; empty where they are."""
    if not found["matched_iterations"]:
        return "no iteration is in both runs"
    only_a, only_b = found["only_in_a"], found["only_in_b"]
    if only_a or only_b:
        return f"iterations do not match: {only_a} only in A, {only_b} only in B"
    for name in COMPARED:
        worst = found[f"max_{name}_difference"]
        if worst > tolerance:
            return f"{name} differs by {worst:.3g}, more than {tolerance:g}"
    return ""


def rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The comparison as (what, A, B); a figure about both runs stands under A."""
    table: list[tuple[str, str, str]] = []
    for name, value in found.items():
        if name == "configuration":
            table += [(key, str(a), str(b)) for key, (a, b) in value.items()]
        elif name.endswith("_a") and name[:-2] + "_b" in found:
            table.append((name[:-2], _text(value), _text(found[name[:-2] + "_b"])))
        elif not (name.endswith("_b") and name[:-2] + "_a" in found):
            table.append((name, _text(value), ""))
    return table


def render(found: Mapping[str, Any], form: str) -> str:
    """The comparison as `md`, `csv` or `json` (strict: what is not finite is a string)."""
    if form == "json":
        strict = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in found.items()
        }
        return json.dumps(strict, indent=2, allow_nan=False) + "\n"
    return text_of([("what", "A", "B"), *rows(found)], form)


def text_of(table: Sequence[Sequence[str]], form: str) -> str:
    """A table with its heading as `md` or `csv`."""
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        return text.getvalue()
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]]) + "\n"


COLUMNS = {
    "devices": "parallel.world_size", "TP": "parallel.tensor_parallel",
    "PP": "parallel.pipeline_parallel", "SP": "parallel.sequence_parallel",
    "ZeRO": "parallel.zero_stage", "layers": "model.num_layers", "MBS": "train.micro_batch_size",
    "GAS": "train.gradient_accumulation_steps", "GBS": "train.global_batch_size",
    "ACKPT": "train.activation_checkpointing",
}  # fmt: skip
"""Heading of a column in a table of many runs -> key of run.json."""


def line_of(run: Path) -> dict[str, str]:
    """A run in the table of many: name, layout, last loss, rates, and its address at W&B."""
    records, place = read(locate(run)), locate(run).parent
    flat, rate, steps = flatten(run_json(run)), throughput(records), training_steps(records)
    line = {"run": place.name} | {name: str(flat.get(key, "-")) for name, key in COLUMNS.items()}
    line["loss"] = _text(steps[-1]["loss"] if steps else None)
    for name in RATES:
        line[name] = _text(getattr(rate, name, None))
    address = place / "wandb" / "run_url"
    line["W&B"] = address.read_text(encoding="utf-8").strip() if address.exists() else "-"
    return line


def many(runs: Sequence[Path], form: str) -> str:
    """The table of three runs or more."""
    lines = [line_of(run) for run in runs]
    if form == "json":
        return json.dumps(lines, indent=2) + "\n"
    return text_of([list(lines[0]), *(list(line.values()) for line in lines)], form)


def run_json(run: Path) -> dict[str, Any]:
    """run.json beside the metrics; empty where there is none.

    Raises:
        DataError: it is no JSON object.
    """
    path = locate(run).with_name("run.json")
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: not a JSON object: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("more", type=Path, nargs="*")
    parser.add_argument(
        "--assert-equal", type=float, metavar="TOL", help="most that loss and grad_norm may differ"
    )
    parser.add_argument("--format", choices=("md", "csv", "json"), default="md")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.assert_equal is not None and not chosen.assert_equal >= 0:
            raise ConfigError(f"--assert-equal {chosen.assert_equal}: a tolerance is a number >= 0")
        if chosen.more:
            if chosen.assert_equal is not None:
                raise ConfigError("--assert-equal compares two runs")
            print(many([chosen.a, chosen.b, *chosen.more], chosen.format), end="")
            return 0
        a, b = (read(locate(run)) for run in (chosen.a, chosen.b))
        found = compare(a, b, run_json(chosen.a), run_json(chosen.b))
    except (ConfigError, DataError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return error.exit_status
    print(render(found, chosen.format), end="")
    why = "" if chosen.assert_equal is None else disagreement(found, chosen.assert_equal)
    if why:
        print(f"compare_runs: not equal: {why}", file=sys.stderr)
    return 1 if why else 0


def _text(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())

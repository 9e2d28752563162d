"""report.md: what a run was and how it went, made from run.json and metrics.jsonl alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.analysis.plot import plot, save_png, series
from megatron.analysis.summary import flatten, throughput, worked
from megatron.config.skip import merge, ranges_text
from megatron.training import metrics_file as records

LAYOUT = {
    "parameters": "parameters",
    "tensor_parallel": "TP",
    "pipeline_parallel": "PP",
    "sequence_parallel": "SP",
    "world_size": "devices",
    "zero_stage": "ZeRO stage",
    "micro_batch_size": "micro-batch",
    "gradient_accumulation_steps": "gradient accumulation",
    "global_batch_size": "global batch",
    "seq_length": "sequence",
    "num_layers": "layers",
    "hidden_size": "hidden",
    "dtype": "precision",
    "optimizer": "optimizer",
    "learning_rate": "highest learning rate",
    "lr_decay_style": "schedule",
}
"""Last part of a run.json key -> its name in the report."""

PROVENANCE = "provenance"
"""The part of run.json that says where the run was made."""


def report(run: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], title: str) -> str:
    """The report as Markdown.

    Args:
        run: run.json: nested configuration and, under "provenance", where the run was made.
        metrics: the run's records.
        title: heading.
    """
    metrics = list(metrics)
    parts = [
        f"# {title}",
        _outcome(metrics),
        _curve(metrics),
        _table("Throughput", _throughput(metrics)),
    ]
    flat = flatten({name: value for name, value in run.items() if name != PROVENANCE})
    known = {name.rpartition(".")[2]: value for name, value in flat.items()}
    layout = [
        (label, str(known[name])) for name, label in LAYOUT.items() if known.get(name) is not None
    ]
    parts.append(_table("Configuration", layout))
    parts.append(_skipped(metrics, known))
    origin = flatten(run.get(PROVENANCE, {}))
    parts.append(
        _table("Provenance", [(name, str(value)) for name, value in sorted(origin.items())])
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def write_report(folder: Path) -> Path:
    """Writes report.md and plots/ of the run in `folder`.

    Returns:
        The report's path.

    Raises:
        OSError: run.json or metrics.jsonl cannot be read, or the folder not written.
        ValueError: one of them is damaged (DataError for metrics.jsonl).
    """
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = records.read(folder / "metrics.jsonl")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    curves = {folder.name: series(metrics)}
    _write(plots / "loss.txt", plot(curves, "loss"))
    save_png(plots / "loss.png", curves, folder.name)
    path = folder / "report.md"
    _write(path, report(run, metrics, folder.name))
    return path


def _outcome(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = worked(metrics)
    if not steps:
        return "No step did work."
    first, last = steps[0], steps[-1]
    seconds = timedelta(seconds=round(last["time"] - first["time"]))
    lines = [
        f"Loss {first['loss']:.4f} at step {first['iteration']}, "
        f"{last['loss']:.4f} at step {last['iteration']} of {last['train_iters']}; "
        f"{last['consumed_tokens']:,} tokens; {seconds} from first to last."
    ]
    for record in {
        record["split"]: record for record in metrics if record["event"] == "eval"
    }.values():
        lines.append(
            f"Last {record['split']} loss {record['loss']:.4f}, "
            f"perplexity {record['perplexity']:.2f}, at step {record['iteration']} "
            f"over {record['samples']} samples."
        )
    nan = sum(record["nan_iterations"] for record in steps)
    if nan:
        lines.append(f"The loss was not finite in {nan} steps.")
    stops = [record for record in metrics if record["event"] == "stop"]
    if stops:
        lines.append(f"Stopped at step {stops[-1]['iteration']}: {stops[-1]['reason']}.")
    return "\n".join(lines)


def _curve(metrics: Sequence[Mapping[str, Any]]) -> str:
    return f"```\n{plot({'loss': series(metrics)}, 'loss')}```"


def _throughput(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rate = throughput(metrics)
    if rate is None:
        return []
    low, median, high = rate.step_seconds
    last = worked(metrics)[-1]
    return [
        ("tokens/s", f"{rate.tokens_per_s:,.1f}"),
        ("tokens/s a device", f"{rate.tokens_per_gpu_per_s:,.1f} on {rate.world_size}"),
        ("TFLOPS a device (LM)", f"{rate.tflops_lm:.2f}"),
        ("MFU, last line", "peak unknown" if last["mfu"] is None else f"{last['mfu']:.1%}"),
        ("step, 10% / median / 90%", f"{low:.3f} / {median:.3f} / {high:.3f} s"),
        ("most memory", f"{last['memory_max_gib']:.2f} GiB"),
        ("counted", f"{rate.steps} steps that did work, warm-up left out"),
    ]


def _skipped(metrics: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> str:
    lines = []
    if known.get("train_range_to_skip"):
        lines.append(f"Asked for: {known['train_range_to_skip']}")
    seen = merge((record["iteration"],) * 2 for record in metrics if record["event"] == "skip")
    if seen:
        lines.append(f"Logged as skipped: {ranges_text(seen)}")
    return "\n".join(["## Skipped steps", "", *lines]) if lines else ""


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    return "\n".join(
        [
            f"## {title}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _write(path: Path, text: str) -> None:
    """All of the file or nothing: a reader never sees half a report."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)

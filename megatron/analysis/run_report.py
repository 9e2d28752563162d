"""report.md: a run's configuration and results, from run.json and metrics.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.analysis.plot import plot, save_png, series
from megatron.analysis.summary import flatten, throughput, training_steps
from megatron.checkpoint.atomic import write_atomically
from megatron.config.skip import merge, ranges_text
from megatron.training import metrics_file

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
"""Key of run.json's section on where the run was made."""


def report(run: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], title: str) -> str:
    """The report as Markdown.

    Args:
        run: run.json: nested configuration and, under "provenance", where the run was made.
        metrics: the run's records.
        title: heading.
    """
    metrics = list(metrics)
    flat = flatten({name: value for name, value in run.items() if name != PROVENANCE})
    known = {name.rpartition(".")[2]: value for name, value in flat.items()}
    origin = flatten(run.get(PROVENANCE, {}))
    parts = [
        f"# {title}",
        _outcome(metrics),
        f"```\n{plot({'loss': series(metrics)}, 'loss')}```",
        _table("Throughput", _throughput(metrics)),
        _table("Configuration", [(label, known.get(name)) for name, label in LAYOUT.items()]),
        _skipped(metrics, known),
        _table("Provenance", [(k, str(v)) for k, v in sorted(origin.items())]),
    ]
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
    metrics = metrics_file.read(folder / "metrics.jsonl")
    address = folder / "wandb" / "run_url"
    if address.exists():
        run.setdefault(PROVENANCE, {})["wandb"] = address.read_text(encoding="utf-8").strip()
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    curves = {folder.name: series(metrics)}
    write_atomically(plots / "loss.txt", plot(curves, "loss"), durable=False)
    save_png(plots / "loss.png", curves, folder.name)
    path = folder / "report.md"
    write_atomically(path, report(run, metrics, folder.name), durable=False)
    return path


def _outcome(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = training_steps(metrics)
    if not steps:
        return "No step did work."
    first, last = steps[0], steps[-1]
    seconds = timedelta(seconds=round(last["time"] - first["time"]))
    lines = [
        f"Loss {first['loss']:.4f} at step {first['iteration']}, "
        f"{last['loss']:.4f} at step {last['iteration']} of {last['train_iters']}; "
        f"{last['consumed_tokens']:,} tokens; {seconds} from first to last."
    ]
    evaluations = {record["split"]: record for record in metrics if record["event"] == "eval"}
    for split, record in evaluations.items():
        lines.append(
            f"Last {split} loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}, "
            f"at step {record['iteration']} over {record['samples']} samples."
        )
    nan = sum(record["nan_iterations"] for record in steps)
    if nan:
        lines.append(f"The loss was not finite in {nan} steps.")
    stops = [record for record in metrics if record["event"] == "stop"]
    if stops:
        lines.append(f"Stopped at step {stops[-1]['iteration']}: {stops[-1]['reason']}.")
    return "\n".join(lines)


def _throughput(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rate = throughput(metrics)
    if rate is None:
        return []
    low, median, high = rate.step_seconds
    steps = training_steps(metrics)
    last = steps[-1]
    tera = sum(r["tflops_lm"] * r["world_size"] * r["elapsed_s"] * r["steps"] for r in steps)
    per_step = rate.tokens / rate.steps
    return [
        ("steps/s", f"{rate.steps_per_s:.4g}"),
        ("samples/s", f"{rate.tokens_per_s / last['seq_length']:,.4g}"),
        ("samples per step", f"{per_step / last['seq_length']:,.4g}"),
        ("tokens per step", f"{per_step:,.0f}"),
        ("tokens/s", f"{rate.tokens_per_s:,.1f}"),
        ("tokens/s per device", f"{rate.tokens_per_gpu_per_s:,.1f} on {rate.world_size}"),
        ("TFLOPS per device (LM)", f"{rate.tflops_lm:.2f}"),
        ("FLOPs (LM), all logged steps", f"{tera * 1e12:.4g}"),
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


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    """A heading and a row for each value that is known; nothing without any."""
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""

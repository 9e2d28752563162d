"""report.md: a run's configuration and results, from run.json and metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.analysis.plot import evaluations, plot, series
from megatron.analysis.recorded_run import RecordedRun
from megatron.analysis.summary import flatten, throughput, training_steps
from megatron.checkpoint.atomic import write_atomically
from megatron.config.skip import merge, ranges_text

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


@dataclass(frozen=True)
class Section:
    """A table of the report: names and values under a title."""

    title: str
    rows: Sequence[tuple[str, str]]


def sections(run: RecordedRun) -> list[Section]:
    """The report's tables; only those with something in them."""
    known = run.settings
    layout = [(label, str(known[name])) for name, label in LAYOUT.items()
              if known.get(name) is not None]  # fmt: skip
    origin = sorted((name, str(value)) for name, value in flatten(run.origin).items())
    corpora = [
        (corpus, f"{share:.1%} of the samples; {tokens:,} tokens in {files:,} file(s)")
        for corpus, files, tokens, share in run.corpora
    ]
    tables = [
        Section("Throughput", _throughput(run.records)),
        Section("Configuration", layout),
        Section("Skipped steps", _skipped(run)),
        Section("Spikes", _spikes(run.records)),
        Section("Corpora", corpora),
        Section("Provenance", origin),
    ]
    return [table for table in tables if table.rows]


def headline(run: RecordedRun) -> dict[str, str]:
    """The few numbers that are looked at first; those that are known."""
    rate = throughput(run.records)
    if rate is None:
        return {}
    last, resolved = run.steps[-1], run.resolved
    valid = evaluations(run.records)
    best = min(valid, key=lambda point: point[1], default=None)
    numbers = {
        "parameters": "" if resolved is None else f"{resolved.parameters:,}",
        "layout": "" if resolved is None else str(resolved.layout),
        "steps": f"{last['iteration']:,} of {last['train_iters']:,}",
        "tokens": f"{last['consumed_tokens']:,}",
        "last loss": f"{last['loss']:.4f}",
        "best validation": "" if best is None else f"{best[1]:.4f} at step {best[0]:,}",
        "tokens/s": f"{rate.tokens_per_s:,.0f}",
        "TFLOPS per device": f"{rate.tflops_lm:.3g}",
        "most memory": f"{last['memory_max_gib']:.2f} GiB",
    }
    return {name: text for name, text in numbers.items() if text}


def report(run: RecordedRun) -> str:
    """The report as Markdown."""
    parts = [
        f"# {run.name}",
        "\n".join(outcome(run.records)),
        f"```\n{loss_plot(run.records)}```",
        *map(_table, sections(run)),
    ]
    return "\n\n".join(parts) + "\n"


def loss_plot(
    records: Iterable[Mapping[str, Any]], width: int = 80, encoding: str = "utf-8"
) -> str:
    """Training and validation loss in characters."""
    records = list(records)
    points = {"loss": evaluations(records)}
    return plot({"loss": series(records)}, "loss", width=width, encoding=encoding, points=points)


def write_report(run: RecordedRun, folder: Path) -> Path:
    """Writes report.md and plots/loss.txt into a run's folder.

    Returns:
        The report's path.

    Raises:
        OSError: they cannot be written.
    """
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    write_atomically(plots / "loss.txt", loss_plot(run.records), durable=False)
    path = folder / "report.md"
    write_atomically(path, report(run), durable=False)
    return path


def outcome(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the run went, in sentences."""
    steps = training_steps(metrics)
    if not steps:
        return ["No step did work."]
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
            f"{_accuracy(record)}"
            f"at step {record['iteration']} over {record['samples']} samples."
        )
    nan = sum(record["nan_iterations"] for record in steps)
    if nan:
        lines.append(f"The loss was not finite in {nan} steps.")
    stops = [record for record in metrics if record["event"] == "stop"]
    if stops:
        lines.append(f"Stopped at step {stops[-1]['iteration']}: {stops[-1]['reason']}.")
    return lines


def _accuracy(record: Mapping[str, Any]) -> str:
    return f"accuracy {record['accuracy']:.2%}, " if record.get("accuracy") is not None else ""


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


def _skipped(run: RecordedRun) -> list[tuple[str, str]]:
    asked = run.settings.get("train_range_to_skip")
    seen = skipped_ranges(run.records)
    rows = [("asked for", str(asked) if asked else ""), ("logged as skipped", ranges_text(seen))]
    return [(name, text) for name, text in rows if text]


def skipped_ranges(records: Iterable[Mapping[str, Any]]) -> tuple[tuple[int, int], ...]:
    """Steps that were skipped, as inclusive ranges."""
    return merge((record["iteration"],) * 2 for record in records if record["event"] == "skip")


def _spikes(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"step {r['iteration']}", f"loss {r['loss']:.4g}, {r['action']}; samples: {r['report']}")
        for r in records
        if r["event"] == "spike"
    ]


def _table(section: Section) -> str:
    lines = [f"| {name} | {value} |" for name, value in section.rows]
    return "\n".join([f"## {section.title}", "", "| | |", "|---|---|", *lines])

"""The lines a run prints: one pure function a kind of record, fields joined by ` | `.

Names, order and widths of a step's line are those of the Megatron-DeepSpeed logs people already
parse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SEPARATOR = " | "


def line(record: Mapping[str, Any]) -> str:
    """The line of a record, by its event."""
    return LINES[record["event"]](record)


def step_line(record: Mapping[str, Any]) -> str:
    """A step that did work: counters, loss, rates.

    A number that the engine does not know leaves its field out.
    """
    fields = [
        *_counters(record),
        f"elapsed_time_per_iteration_ms={record['elapsed_s'] * 1000:.1f}",
        f"learning_rate={record['learning_rate']:.6g}",
        f"global_batch_size={record['global_batch_size']}",
        f"lm loss={record['loss']:.6f}",
        _optional("loss_scale", record["loss_scale"], ".1f"),
        _optional("grad_norm", record["grad_norm"], ".3f"),
        f"actual_seqlen={record['seq_length']:5d}",
        *_lost_steps(record),
        *(f"lm loss of {name}={v:.6f}" for name, v in record.get("corpus_loss", {}).items()),
        f"samples_per_second={record['samples_per_s']:.3f}",
        f"tokens_per_gpu_per_second_tgs={record['tokens_per_gpu_per_s']:.3f}",
        f"[LM]TFLOPs={record['tflops_lm']:.2f}",
        f"[DS]TFLOPs={record['tflops_ds']:.2f}",
        _optional("pipeline_bubble", record.get("pipeline_bubble"), ".4f"),
    ]
    return SEPARATOR.join(field for field in fields if field)


def skip_line(record: Mapping[str, Any]) -> str:
    """A skipped step: counters move on, there is no rate and no loss to print."""
    fields = [
        *_counters(record),
        "skipped",
        f"learning_rate={record['learning_rate']:.6g}",
        f"global_batch_size={record['global_batch_size']}",
        f"actual_seqlen={record['seq_length']:5d}",
        *_lost_steps(record),
    ]
    return SEPARATOR.join(fields)


def eval_line(record: Mapping[str, Any]) -> str:
    """An evaluation: keys split, loss, perplexity, samples, elapsed_s."""
    fields = [
        _iteration(record),
        f"{record['split']} lm loss={record['loss']:.6f}",
        f"{record['split']} perplexity={record['perplexity']:.4f}",
        f"samples={record['samples']}",
        f"elapsed_s={record['elapsed_s']:.1f}",
    ]
    return SEPARATOR.join(fields)


def save_line(record: Mapping[str, Any]) -> str:
    """A saved checkpoint: keys path, bytes, elapsed_s."""
    gigabytes = record["bytes"] / 1e9
    rate = gigabytes / record["elapsed_s"] if record["elapsed_s"] else float("inf")
    fields = [
        _iteration(record),
        f"saved={record['path']}",
        f"size_gb={gigabytes:.3f}",
        f"elapsed_s={record['elapsed_s']:.1f}",
        f"gb_per_second={rate:.3f}",
    ]
    return SEPARATOR.join(fields)


def spike_line(record: Mapping[str, Any]) -> str:
    """A suspect step: keys message, loss, grad_norm."""
    loss, norm = record["loss"], record["grad_norm"]
    fields = [
        _iteration(record),
        f"suspect: {record['message']}",
        _optional("lm loss", loss, ".6f"),
        _optional("grad_norm", norm, ".3f"),
    ]
    return SEPARATOR.join(field for field in fields if field)


def stop_line(record: Mapping[str, Any]) -> str:
    """The end of a run: key reason."""
    return SEPARATOR.join([_iteration(record), f"stopped: {record['reason']}"])


def _iteration(record: Mapping[str, Any]) -> str:
    return f"iteration={record['iteration']:8d}/{record['train_iters']:8d}"


def _counters(record: Mapping[str, Any]) -> list[str]:
    return [
        _iteration(record),
        f"consumed_samples={record['consumed_samples']:12d}",
        f"consumed_tokens={record['consumed_tokens']:12d}",
    ]


def _lost_steps(record: Mapping[str, Any]) -> list[str]:
    return [
        f"number_of_skipped_iterations={record['skipped_iterations']:3d}",
        f"number_of_nan_iterations={record['nan_iterations']:3d}",
    ]


def _optional(name: str, value: float | None, form: str) -> str:
    return "" if value is None else f"{name}={value:{form}}"


LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "step": step_line,
    "skip": skip_line,
    "eval": eval_line,
    "save": save_line,
    "spike": spike_line,
    "stop": stop_line,
}

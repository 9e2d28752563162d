"""A record's line on the console and its numbers in W&B and TensorBoard, by its event.

Steps, taken or skipped, are shown as METRICS says; every other event has its row in EVENTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron.training.metrics import METRICS, SEPARATOR
from megatron.training.metrics_file import MetricsRecord


@dataclass(frozen=True)
class Event:
    """How the records of an event are shown.

    Attributes:
        fields: of its line; empty ones are left out.
        scalars: its numbers, named `<group>/<name>`.
        groups: the groups of these names.
    """

    fields: Callable[[MetricsRecord], list[str]]
    scalars: Callable[[MetricsRecord], Mapping[str, float]] = lambda record: {}
    groups: tuple[str, ...] = ()


def line(record: MetricsRecord) -> str:
    """The line of a record: fields joined by ` | `.

    Raises:
        KeyError: EVENTS has no such event.
    """
    return SEPARATOR.join(field for field in EVENTS[record["event"]].fields(record) if field)


def scalars(record: MetricsRecord, parameters: int) -> dict[str, float]:
    """The named numbers of a record, and for each group of names its `<group>/iteration`.

    Args:
        record: a record of metrics.jsonl; what is unknown (None) is left out.
        parameters: parameters of the model.
    """
    named = dict(EVENTS[record["event"]].scalars(record))
    if record["event"] == "step":
        named["throughput/approx_params_in_billions"] = parameters / 1e9
    return named | {f"{_group(name)}/iteration": record["iteration"] for name in named}


def groups() -> list[str]:
    """Groups of all names: each has its own `<group>/iteration`, the x axis of its charts."""
    names = [name for metric in METRICS for name in (*metric.scalars, *metric.derived)]
    others = [group for event in EVENTS.values() for group in event.groups]
    return sorted({*map(_group, names), *others})


def _group(name: str) -> str:
    return name.partition("/")[0]


def _metrics_fields(record: MetricsRecord) -> list[str]:
    return [metric.text(record) for metric in sorted(METRICS, key=lambda metric: metric.place)]


def _metrics_scalars(record: MetricsRecord) -> dict[str, float]:
    return {name: value for metric in METRICS for name, value in metric.numbers(record).items()}


def _iteration(record: MetricsRecord) -> str:
    return "iteration={iteration:8d}/{train_iters:8d}".format_map(record)


def _eval_fields(record: MetricsRecord) -> list[str]:
    return [
        _iteration(record),
        f"{record['split']} lm loss={record['loss']:.6f}",
        f"{record['split']} perplexity={record['perplexity']:.4f}",
        f"samples={record['samples']}",
        f"elapsed_s={record['elapsed_s']:.1f}",
    ]


def _eval_scalars(record: MetricsRecord) -> dict[str, float]:
    group = {"validation": "val", "test": "test"}[record["split"]]
    return {f"{group}/lm loss": record["loss"], f"{group}/ppl_lm loss": record["perplexity"]}


def _save_fields(record: MetricsRecord) -> list[str]:
    gigabytes = record["bytes"] / 1e9
    rate = gigabytes / record["elapsed_s"] if record["elapsed_s"] else float("inf")
    return [
        _iteration(record),
        f"saved={record['path']}",
        f"size_gb={gigabytes:.3f}",
        f"elapsed_s={record['elapsed_s']:.1f}",
        f"gb_per_second={rate:.3f}",
    ]


def _stop_fields(record: MetricsRecord) -> list[str]:
    return [_iteration(record), f"stopped: {record['reason']}"]


EVENTS: dict[str, Event] = {
    "step": Event(_metrics_fields, _metrics_scalars),
    "skip": Event(_metrics_fields, _metrics_scalars),
    "eval": Event(_eval_fields, _eval_scalars, ("val", "test")),
    "save": Event(
        _save_fields, lambda r: {"timers/save-checkpoint-time": r["elapsed_s"]}, ("timers",)
    ),
    "stop": Event(_stop_fields),
}

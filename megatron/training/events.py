"""A record's line on the console, its row in W&B and its points in TensorBoard, by its event.

METRICS defines how steps, taken or skipped, are shown; every other event has its row in EVENTS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.training.metrics import METRICS, SEPARATOR, Text, render
from megatron.training.metrics_file import MetricsRecord

_ITERATION = "iteration={iteration:8d}/{train_iters:8d} | "


@dataclass(frozen=True)
class Event:
    """How the records of an event are shown.

    Attributes:
        line: what is printed.
        scalars: its numbers, named `<group>/<name>`.
        groups: the groups of these names.
        points: its numbers in TensorBoard, if those are others.
    """

    line: Text
    scalars: Callable[[MetricsRecord], dict[str, float]] = lambda record: {}
    groups: tuple[str, ...] = ()
    points: Callable[[MetricsRecord], dict[str, float]] | None = None


def line(record: MetricsRecord) -> str:
    """The line of a record: fields joined by ` | `.

    Raises:
        KeyError: EVENTS has no such event.
    """
    return render(EVENTS[record["event"]].line, record)


def scalars(record: MetricsRecord, parameters: int) -> dict[str, float]:
    """W&B's row of a record: its numbers, and for each group of names its `<group>/iteration`.

    Args:
        record: a record of metrics.jsonl; what is unknown (None) is left out.
        parameters: parameters of the model.
    """
    named = EVENTS[record["event"]].scalars(record)
    if record["event"] == "step":
        named["throughput/approx_params_in_billions"] = parameters / 1e9
    return named | {f"{_group(name)}/iteration": record["iteration"] for name in named}


def points(record: MetricsRecord) -> dict[str, float]:
    """TensorBoard's points of a record: each number once; its step is the x axis of all."""
    event = EVENTS[record["event"]]
    return (event.points or event.scalars)(record)


def groups() -> list[str]:
    """Groups of all names: each has its own `<group>/iteration`, the x axis of its charts."""
    names = [name for metric in METRICS for name in (*metric.scalars, *metric.derived)]
    others = [group for event in EVENTS.values() for group in event.groups]
    return sorted({*map(_group, names), *others})


def _group(name: str) -> str:
    return name.partition("/")[0]


def _step_line(record: MetricsRecord) -> str:
    fields = [metric.text(record) for metric in sorted(METRICS, key=lambda metric: metric.place)]
    return SEPARATOR.join(field for field in fields if field)


def _step_scalars(record: MetricsRecord) -> dict[str, float]:
    return {name: value for metric in METRICS for name, value in metric.numbers(record).items()}


def _step_points(record: MetricsRecord) -> dict[str, float]:
    return {name: value for metric in METRICS for name, value in metric.points(record).items()}


def _save_line(record: MetricsRecord) -> str:
    size, seconds = record["bytes"] / 1e9, record["elapsed_s"]
    rate = size / seconds if seconds else float("inf")
    return (
        f"{_ITERATION.format_map(record)}saved={record['path']} | size_gb={size:.3f} | "
        f"elapsed_s={seconds:.1f} | gb_per_second={rate:.3f}"
    )


def _eval_scalars(record: MetricsRecord) -> dict[str, float]:
    group = {"validation": "val", "test": "test"}[record["split"]]
    named = {"lm loss": record["loss"], "ppl_lm loss": record["perplexity"]}
    more = ("accuracy", "samples_per_s")  # which records of an older version lack
    return {f"{group}/{name}": value for name, value in {**named, **_of(record, more)}.items()}


def _of(record: MetricsRecord, names: Sequence[str]) -> dict[str, float]:
    return {name: record[name] for name in names if record.get(name) is not None}


def _spike_line(record: MetricsRecord) -> str:
    scores = [(record[f"z_{key}"], record[key]) for key in ("loss", "grad_norm")]
    loss, norm = (f"{v:.6g} (z={'unknown' if z is None else f'{z:.1f}'})" for z, v in scores)
    return (
        f"{_ITERATION.format_map(record)}spike: lm loss={loss} | grad_norm={norm} | "
        f"action={record['action']} | suspects={record['report']}"
    )


def _spike_scalars(record: MetricsRecord) -> dict[str, float]:
    scores = {f"stability/z_{key}": record[f"z_{key}"] for key in ("loss", "grad_norm")}
    return {name: z for name, z in scores.items() if z is not None}


EVENTS: dict[str, Event] = {
    "step": Event(_step_line, _step_scalars, points=_step_points),
    "skip": Event(_step_line, _step_scalars, points=_step_points),
    "eval": Event(
        _ITERATION + "{split} lm loss={loss:.6f} | {split} perplexity={perplexity:.4f} | "
        "{split} accuracy={accuracy:.4f} | samples={samples} | elapsed_s={elapsed_s:.1f} | "
        "samples_per_second={samples_per_s:.3f}",
        _eval_scalars,
        ("val", "test"),
    ),
    "sample": Event(
        _ITERATION
        + "sample, generated after [...] | elapsed_s={elapsed_s:.1f}\n{prompt}[...]{text}",
        groups=("sample",),
    ),
    "save": Event(
        _save_line, lambda r: {"timers/save-checkpoint-time": r["elapsed_s"]}, ("timers",)
    ),
    "spike": Event(_spike_line, _spike_scalars, ("stability",)),
    "rollback": Event(
        _ITERATION + "rolled back from step {spike}: steps {skipped} are skipped | "
        "rollback {rollbacks} of at most {max_rollbacks}",
        lambda r: {"stability/rollbacks": r["rollbacks"]},
        ("stability",),
    ),
    "stop": Event(_ITERATION + "stopped: {reason}"),
}

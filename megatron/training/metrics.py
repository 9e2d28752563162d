"""Metrics: one row each, from a finished interval to metrics.jsonl, console, W&B and TensorBoard.

Global rates are measured; every per-device figure is the global one divided, once and here, by the
number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.checkpoint.state import RunState
from megatron.config import pace
from megatron.config.pipeline_stages import modelled_bubble
from megatron.config.schema import RunConfig
from megatron.training.device import Device
from megatron.training.metrics_file import MetricsRecord

SEPARATOR = " | "  # between the fields of a line

Text = str | Callable[[MetricsRecord], str]
"""Text about a record: a format over its keys, or a function of it."""


def render(text: Text, record: MetricsRecord) -> str:
    """The text of a record."""
    return text(record) if callable(text) else text.format_map(record)


@dataclass(frozen=True)
class Interval:
    """What happened between two records: all that a metric is computed from.

    Attributes:
        run, device: the configuration and this rank's device.
        state: where the run stands at the end.
        seconds: time of the steps that did work, all together.
        ended: seconds since the epoch.
        learning_rate: rate of the last step.
        steps: (mean loss in nats per token, gradient norm) of each step; None where it did no work.
        loss_scale: the last step's; None where the engine has none.
        skipped: steps that changed no weight.
        measured: what the engine measured, such as the pipeline's bubble.
        corpus_loss: loss of each corpus; None where it is not logged.
    """

    run: RunConfig
    device: Device
    state: RunState
    seconds: float
    ended: float
    learning_rate: float
    steps: Sequence[tuple[float, float | None] | None]
    loss_scale: float | None
    skipped: int
    measured: Mapping[str, Any]
    corpus_loss: Mapping[str, float] | None

    @property
    def losses(self) -> list[float]:
        """Of the steps that did work."""
        return [step[0] for step in self.steps if step is not None]

    @property
    def grad_norm(self) -> float | None:
        """Of the last step that did work."""
        norms = [step[1] for step in self.steps if step is not None]
        return norms[-1] if norms else None

    @property
    def samples(self) -> int:
        """Of the steps that did work, over all devices."""
        first, sizes = self.state.iteration - len(self.steps) + 1, self.run.batch_sizes
        worked = [n for n, step in enumerate(self.steps, first) if step is not None]
        return sum(sizes.of(number) for number in worked)

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step that did work."""
        return self.seconds / len(self.losses)

    @property
    def tokens_per_s(self) -> float:
        """All devices together."""
        return self.samples * self.run.model.seq_length / self.seconds

    @property
    def tokens_per_gpu_per_s(self) -> float:
        """One device."""
        return self.tokens_per_s / self.run.parallel.world_size

    def tflops(self, count: str) -> float:
        """TFLOPS of one device.

        Args:
            count: lm: full attention, no recompute (Megatron-LM); ds: as DeepSpeed's formula
                counts, recompute included; causal: as lm with half the attention.
        """
        run, tp = self.run, self.run.parallel.tensor_parallel
        counts = run.architecture
        per_token = {
            "lm": counts.flops_per_token_lm(run.model, tp),
            "ds": counts.flops_per_token_ds(run.model, run.train.activation_checkpointing, tp),
            "causal": counts.flops_per_token_causal(run.model, tp),
        }
        return self.tokens_per_gpu_per_s * per_token[count] / 1e12

    @property
    def mfu(self) -> float | None:
        """TFLOPS (lm) as a fraction of the device's dense peak; None where the peak is unknown."""
        peak = self.device.peak_tflops
        return None if peak is None else self.tflops("lm") / peak

    @property
    def modelled_bubble(self) -> float | None:
        """1F1B's bubble, (p - 1) / (m + p - 1), beside a measured one."""
        micro_batches = self.run.train.gradient_accumulation_steps
        known = "pipeline_bubble" in self.measured
        return (
            modelled_bubble(self.run.parallel.pipeline_parallel, micro_batches) if known else None
        )


@dataclass(frozen=True)
class Metric:
    """One entry of a record, and how it is shown.

    Attributes:
        key: its key in metrics.jsonl.
        value: computes it; None is unknown: null in metrics.jsonl, left out everywhere else.
        console: its field of the line; an empty one is left out.
        place: where the field stands in the line; without one, at the end.
        scalars: its names in W&B, of which TensorBoard has the last; a mapping's entries fill in
            `{}`.
        derived: name in W&B -> a number made from the record of a step.
        always: also known where no step of the interval did work.
        optional: its key is left out, rather than null, where it is unknown.
    """

    key: str
    value: Callable[[Interval], Any]
    console: Text = ""
    place: float = math.inf
    scalars: tuple[str, ...] = ()
    derived: Mapping[str, Callable[[MetricsRecord], float]] = field(default_factory=dict)
    always: bool = False
    optional: bool = False

    def text(self, record: MetricsRecord) -> str:
        """Its field of the record's line; empty where it is unknown or not shown."""
        return "" if record.get(self.key) is None else render(self.console, record)

    def numbers(self, record: MetricsRecord) -> dict[str, float]:
        """Its numbers in W&B by name; none where it is unknown."""
        known = record["event"] == "step" and record.get(self.key) is not None
        derived = self.derived if known else {}
        numbers = {name: derive(record) for name, derive in derived.items()}
        return self._named(self.scalars, record) | numbers

    def points(self, record: MetricsRecord) -> dict[str, float]:
        """Its numbers in TensorBoard by name, each number once."""
        return self._named(self.scalars[-1:], record)

    def _named(self, names: Sequence[str], record: MetricsRecord) -> dict[str, float]:
        value: Any = record.get(self.key)
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {name.format(entry): value[entry] for name in names for entry in value}
        return dict.fromkeys(names, value)


# fmt: off
METRICS: list[Metric] = [
    Metric("event", lambda i: "step" if i.losses else "skip",
           lambda r: "skipped" if r["event"] == "skip" else "", 4, always=True),
    Metric("iteration", lambda i: i.state.iteration,
           "iteration={iteration:8d}/{train_iters:8d}", 1, always=True),
    Metric("train_iters", lambda i: i.run.train.train_iters, always=True),
    Metric("time", lambda i: i.ended, always=True),
    Metric("consumed_samples", lambda i: i.state.consumed_samples,
           "consumed_samples={consumed_samples:12d}", 2,
           ("training/consumed_samples",), always=True),
    Metric("consumed_tokens", lambda i: i.state.consumed_tokens,
           "consumed_tokens={consumed_tokens:12d}", 3,
           ("optimizer/consumed_train_tokens", "training/consumed_tokens"),
           {"lm-loss-training/consumed_train_tokens": lambda r: r["consumed_tokens"]}, always=True),
    Metric("learning_rate", lambda i: i.learning_rate,
           "learning_rate={learning_rate:.6g}", 6,
           ("learning-rate/learning-rate", "optimizer/learning_rate"), always=True),
    Metric("weight_decay", lambda i: pace.weight_decay(i.run, i.state.iteration)
           if i.run.optimizer.weight_decay_incr_style != "constant" else None,
           scalars=("optimizer/weight_decay",), always=True, optional=True),
    Metric("global_batch_size", lambda i: i.run.batch_sizes.of(i.state.iteration),
           "global_batch_size={global_batch_size}", 7, always=True),
    Metric("seq_length", lambda i: i.run.model.seq_length,
           "actual_seqlen={seq_length:5d}", 11, always=True),
    Metric("world_size", lambda i: i.run.parallel.world_size, always=True),
    Metric("data_parallel", lambda i: i.run.data_parallel, always=True),
    Metric("skipped_iterations", lambda i: i.skipped,
           "number_of_skipped_iterations={skipped_iterations:3d}", 12,
           ("training/skiped_iterations",  # as saved panels of W&B spell it
            "training/skipped_iterations"), always=True),
    Metric("nan_iterations", lambda i: sum(not math.isfinite(loss) for loss in i.losses),
           "number_of_nan_iterations={nan_iterations:3d}", 13,
           ("training/nan_iterations",), always=True),
    Metric("steps", lambda i: len(i.losses)),
    Metric("loss", lambda i: sum(i.losses) / len(i.losses),
           "lm loss={loss:.6f}", 8, ("lm-loss-training/lm loss", "loss/lm loss")),
    Metric("grad_norm", lambda i: i.grad_norm,
           "grad_norm={grad_norm:.3f}", 10, ("training/grad-norm", "loss/grad_norm")),
    Metric("num_zeros", lambda i: i.measured.get("num_zeros"), "num_zeros={num_zeros:.1f}", 10.1,
           ("training/num-zeros", "loss/num_zeros_in_grad"), optional=True),
    Metric("params_norm", lambda i: i.measured.get("params_norm"),
           "params_norm={params_norm:.3f}", 10.2,
           ("training/params-norm", "loss/params_norm"), optional=True),
    Metric("optimizer_states", lambda i: i.measured.get("optimizer_states"),
           scalars=("optimizer/{}",), optional=True),
    Metric("loss_scale", lambda i: i.loss_scale,
           "loss_scale={loss_scale:.1f}", 9, ("loss/loss_scale",)),
    Metric("elapsed_s", lambda i: i.step_seconds,
           lambda r: f"elapsed_time_per_iteration_ms={r['elapsed_s'] * 1000:.1f}", 5,
           ("training/iteration_time", "throughput/iteration-time"),
           {"throughput/elapsed_ms_per_iteration": lambda r: r["elapsed_s"] * 1000,
            "training/iteration_time_vs_tokens": lambda r: r["elapsed_s"] / r["consumed_tokens"],
            "training/iteration_time_vs_samples":
                lambda r: r["elapsed_s"] / r["consumed_samples"]}),
    Metric("samples_per_s", lambda i: i.samples / i.seconds,
           "samples_per_second={samples_per_s:.3f}", 15, ("throughput/samples_per_sec",),
           {"throughput/samples_per_sec_per_replica":
                lambda r: r["samples_per_s"] / r["data_parallel"]}),
    Metric("tokens_per_s", lambda i: i.tokens_per_s, scalars=("throughput/tokens_per_sec",),
           derived={"throughput/tokens_per_sec_per_replica":
                lambda r: r["tokens_per_s"] / r["data_parallel"]}),
    # A device does part of one replica's work only, so the figure per replica is the same.
    Metric("tokens_per_gpu_per_s", lambda i: i.tokens_per_gpu_per_s,
           "tokens_per_gpu_per_second_tgs={tokens_per_gpu_per_s:.3f}", 16,
           ("throughput/tokens_per_gpu_per_sec_per_replica", "throughput/tokens_per_gpu_per_sec")),
    Metric("tflops_lm", lambda i: i.tflops("lm"),
           "[LM]TFLOPs={tflops_lm:.2f}", 17, ("throughput/tflops-lm",),
           {"throughput/tflops-new": lambda r: r["tflops_lm"] * r["world_size"]}),  # all devices
    Metric("tflops_ds", lambda i: i.tflops("ds"),
           "[DS]TFLOPs={tflops_ds:.2f}", 18, ("throughput/tflops",)),
    Metric("tflops_causal", lambda i: i.tflops("causal"), scalars=("throughput/tflops-causal",)),
    Metric("mfu", lambda i: i.mfu, scalars=("throughput/mfu",)),
    Metric("memory_max_gib", lambda i: i.device.memory_max_gib(), scalars=("memory/max_gib",)),
    Metric("pipeline_bubble", lambda i: i.measured.get("pipeline_bubble"),
           "pipeline_bubble={pipeline_bubble:.4f}", 19,
           ("throughput/pipeline_bubble",), optional=True),
    Metric("pipeline_bubble_model", lambda i: i.modelled_bubble,
           scalars=("throughput/pipeline_bubble_model",), optional=True),
    Metric("timers_min", lambda i: i.measured.get("timers_min"), optional=True),
    Metric("timers_max", lambda i: i.measured.get("timers_max"),
           scalars=("timers/{}-time",), optional=True),
    Metric("corpus_loss", lambda i: i.corpus_loss,
           lambda r: SEPARATOR.join(
               f"lm loss of {corpus}={loss:.6f}" for corpus, loss in r["corpus_loss"].items()
           ), 14, ("corpus-loss/{}",), always=True, optional=True),
]
# fmt: on
"""In the order of metrics.jsonl. Names, order and widths of the line, and names on dashboards, are
Megatron-DeepSpeed's with true units: seconds unless the name has ms, TFLOPS per device."""

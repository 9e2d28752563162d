"""The figures of a run, one row each, from raw sums over the steps that did work."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.analysis.comparing.compared_run import ComparedRun
from megatron.analysis.comparing.ending import ending
from megatron.analysis.summary import Throughput, throughput, training_steps
from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from megatron.training.metrics_file import MetricsRecord

Shown = float | int | str | None

DATA_FILE = "data.json"
"""What was trained on, in a checkpoint; of a run of tools/hf_trainer.py in the run's folder."""

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class Sums:
    """A run, and the sums that its figures are made from."""

    run: ComparedRun

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """Records of the steps that did work."""
        return training_steps(self.run.records)

    @cached_property
    def rate(self) -> Throughput | None:
        """Tokens and seconds of these steps, warm-up left out; None where no step did work."""
        return throughput(self.run.records)

    @cached_property
    def evaluations(self) -> list[MetricsRecord]:
        """Of the validation data, in order."""
        return [
            record
            for record in self.run.records
            if record["event"] == "eval" and record["split"] == "validation"
        ]

    @property
    def seconds(self) -> float | None:
        """Of all steps that did work; None without one."""
        return math.fsum(r["elapsed_s"] * r["steps"] for r in self.steps) if self.steps else None

    @property
    def seconds_in_all(self) -> float | None:
        """The same with the time that steps waited for evaluations and saves."""
        seconds = self.seconds
        if seconds is None:
            return None
        for record in self.run.records:
            if record["event"] in ("eval", "save"):
                seconds += record["held_s"] if "held_s" in record else record["elapsed_s"]
        return seconds

    @property
    def flops(self) -> float | None:
        """Of all devices and steps that did work: full attention, no recomputation."""
        tera = (r["tflops_lm"] * r["world_size"] * r["elapsed_s"] * r["steps"] for r in self.steps)
        return math.fsum(tera) * 1e12 if self.steps else None

    @property
    def mean_loss(self) -> float | None:
        """Of the steps that did work."""
        count = sum(r["steps"] for r in self.steps)
        return math.fsum(r["loss"] * r["steps"] for r in self.steps) / count if count else None

    @property
    def tokens(self) -> int | None:
        """Tokens seen at the end."""
        tokens: int | None = self.last("consumed_tokens")
        return tokens

    @property
    def epochs(self) -> float | None:
        """Tokens seen by those of the training data; None where the data's are not known."""
        known = data_tokens(self.run.folder)
        return None if self.tokens is None or not known else self.tokens / known

    @property
    def parameters(self) -> int | None:
        """Of the model, padding of the vocabulary included; None where it is not known."""
        settings = self.run.settings
        fields = ModelShape.__dataclass_fields__
        given = {name: settings.get(f"model.{name}") for name in fields}
        known = {name: value for name, value in given.items() if value is not None}
        try:
            shape = ModelShape(**known)
            counts = ARCHITECTURES[shape.architecture]
            return counts.parameters(shape, int(settings.get("parallel.tensor_parallel") or 1))
        except (TypeError, ValueError, KeyError):  # of another version, or by variables alone
            return None

    def setting(self, key: str) -> Shown:
        """A setting by `<section>.<field>`."""
        value: Shown = self.run.settings.get(key)
        return value

    def last(self, key: str) -> Any:
        """A value of the last step that did work."""
        return self.steps[-1].get(key) if self.steps else None

    def evaluated(self, key: str) -> Any:
        """A value of the last evaluation."""
        return self.evaluations[-1].get(key) if self.evaluations else None

    def per_evaluation_second(self, count: float | None) -> float | None:
        """A count of the last evaluation, by its seconds."""
        seconds = self.evaluated("elapsed_s")
        return count / seconds if count is not None and seconds else None

    def batches(self) -> float | None:
        """Batches of the last evaluation."""
        samples, size = self.evaluated("samples"), self.last("global_batch_size")
        return samples / size if samples and size else None


def data_tokens(folder: Path) -> float | None:
    """Tokens of the training share of a run's data, by its newest record; None where none is."""
    checkpoints = sorted(folder.glob(f"checkpoints/step-*/{DATA_FILE}"), reverse=True)
    path = next((path for path in (*checkpoints, folder / DATA_FILE) if path.is_file()), None)
    if path is None:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))[-1]["record"]
        column, shares = record["columns"].index("tokens"), record["shares"]
        tokens = sum(file[column] for stage in record["stages"] for file in stage["files"])
    except (ValueError, LookupError, TypeError):  # damaged, or of another version: not known
        return None
    return float(tokens * shares[0] / sum(shares))


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: its row in a table of two runs.
        value: computes it; None is unknown.
        short: its column in a table of many runs; empty: it has none.
        of: what it says something about where that is a model's quality, which only runs share
            that saw as much (TRAINING) and were evaluated alike (EVALUATION).
        rate: B divided by A says something.
    """

    name: str
    value: Callable[[Sums], Shown]
    short: str = ""
    of: str = ""
    rate: bool = False


def _of_rate(value: Callable[[Throughput], float]) -> Callable[[Sums], Shown]:
    return lambda sums: None if sums.rate is None else value(sums.rate)


def _samples_per_s(sums: Sums) -> Shown:
    seq = sums.last("seq_length")
    return None if sums.rate is None else sums.rate.tokens_per_s / seq


def _best(sums: Sums) -> Shown:
    return min((r["loss"] for r in sums.evaluations), default=None)


def _perplexity(sums: Sums) -> Shown:
    loss = sums.evaluated("loss")
    return None if loss is None else math.exp(min(loss, 20.0))


def _median_mfu(sums: Sums) -> Shown:
    known = [r["mfu"] for r in sums.steps if r.get("mfu") is not None]
    return statistics.median(known) if known else None


def _tokens_per_sample(sums: Sums) -> Shown:
    samples = sums.last("consumed_samples")
    return None if not samples or sums.tokens is None else sums.tokens / samples


def _peak(sums: Sums) -> Shown:
    return max((record["memory_max_gib"] for record in sums.steps), default=None)


def _either(last: str, setting: str) -> Callable[[Sums], Shown]:
    """What the last step had; before the first one, what was set."""
    return lambda sums: sums.last(last) or sums.setting(setting)


# fmt: off
FIGURES: list[Figure] = [
    Figure("status", lambda s: ending(s.run), "status"),
    Figure("parameters", lambda s: s.parameters, "parameters"),
    Figure("steps", lambda s: s.last("iteration"), "steps"),
    Figure("tokens seen", lambda s: s.tokens, "tokens"),
    Figure("last loss", lambda s: s.last("loss"), "loss", TRAINING),
    Figure("best validation loss", _best, "best val", EVALUATION),
    Figure("tokens/s", _of_rate(lambda r: r.tokens_per_s), "tokens/s", rate=True),
    # The rows of a published comparison of two runs, in its order.
    Figure("micro-batch", lambda s: s.setting("train.micro_batch_size"), "MBS"),
    Figure("devices", _either("world_size", "parallel.world_size"), "devices"),
    Figure("global batch", _either("global_batch_size", "train.global_batch_size"), "GBS"),
    Figure("sequence length", _either("seq_length", "model.seq_length"), "seq"),
    Figure("epochs", lambda s: s.epochs),
    Figure("perplexity", _perplexity, of=EVALUATION),
    Figure("FLOPs, all devices", lambda s: s.flops),
    Figure("steps/s", _of_rate(lambda r: r.steps_per_s), rate=True),
    Figure("samples/s", _samples_per_s, "samples/s", rate=True),
    Figure("tokens/sample", _tokens_per_sample),
    Figure("tokens/step", _of_rate(lambda r: r.tokens / r.steps)),
    Figure("tokens/s per device", _of_rate(lambda r: r.tokens_per_gpu_per_s), "tokens/s/device",
           rate=True),
    Figure("train: mean loss", lambda s: s.mean_loss, of=TRAINING),
    Figure("train: runtime, s", lambda s: s.seconds),
    Figure("train: samples", lambda s: s.last("consumed_samples")),
    Figure("eval: accuracy", lambda s: s.evaluated("accuracy"), of=EVALUATION),
    Figure("eval: loss", lambda s: s.evaluated("loss"), "val loss", EVALUATION),
    Figure("eval: runtime, s", lambda s: s.evaluated("elapsed_s")),
    Figure("eval: samples", lambda s: s.evaluated("samples")),
    Figure("eval: samples/s", lambda s: s.per_evaluation_second(s.evaluated("samples")), rate=True),
    Figure("eval: steps/s", lambda s: s.per_evaluation_second(s.batches()), rate=True),
    Figure("W&B", lambda s: s.run.wandb, "W&B"),
    # Beside these.
    Figure("s/step, median", _of_rate(lambda r: r.step_seconds[1]), rate=True),
    Figure("steps/s per device", _of_rate(lambda r: r.steps_per_gpu_per_s), rate=True),
    Figure("TFLOPS per device", _of_rate(lambda r: r.tflops_lm), "TFLOPS", rate=True),
    Figure("MFU, median", _median_mfu, "MFU"),
    Figure("runtime with evaluations and saves, s", lambda s: s.seconds_in_all),
    Figure("peak memory, GiB", _peak, "GiB"),
    Figure("report", lambda s: s.run.report, "report"),
]
# fmt: on

LAYOUT = {
    "model": "model.model_arch", "layers": "model.num_layers", "hosts": "launch.num_hosts",
    "TP": "parallel.tensor_parallel", "PP": "parallel.pipeline_parallel",
    "SP": "parallel.sequence_parallel", "ZeRO": "parallel.zero_stage",
    "GAS": "train.gradient_accumulation_steps", "ACKPT": "train.activation_checkpointing",
    "precision": "train.dtype",
}  # fmt: skip
"""More columns of a table of many runs -> key of the settings."""

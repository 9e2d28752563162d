"""Names of a record's numbers in W&B and TensorBoard: Megatron-DeepSpeed's, with true units.

Seconds unless the name says ms; TFLOPS are per device except `tflops-new`, which is all devices
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

GROUPS = (
    "learning-rate",
    "lm-loss-training",
    "training",
    "optimizer",
    "throughput",
    "loss",
    "memory",
    "corpus-loss",
    "val",
    "test",
    "timers",
)
"""Every group has its own `<group>/iteration`, the x axis of its charts."""

PIPELINE = ("pipeline_bubble", "pipeline_bubble_model")  # measured; (p - 1) / (m + p - 1)
SPLITS = {"validation": "val", "test": "test"}


def scalars(record: Mapping[str, Any], parameters: int) -> dict[str, float]:
    """The named numbers of a record; those that are unknown (None) are left out.

    Args:
        record: a record of metrics.jsonl.
        parameters: parameters of the model.
    """
    choose = TABLE.get(record["event"])
    if choose is None:
        return {}
    named = {name: value for name, value in choose(record, parameters).items() if value is not None}
    iterations = {f"{name.partition('/')[0]}/iteration": record["iteration"] for name in named}
    return named | iterations


def _step(r: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    seconds = r["elapsed_s"]
    return {
        **_skip(r, parameters),
        "lm-loss-training/lm loss": r["loss"],
        "lm-loss-training/consumed_train_tokens": r["consumed_tokens"],
        "training/grad-norm": r["grad_norm"],
        "training/iteration_time": seconds,
        "training/iteration_time_vs_tokens": seconds / r["consumed_tokens"],
        "training/iteration_time_vs_samples": seconds / r["consumed_samples"],
        "training/nan_iterations": r["nan_iterations"],
        "throughput/iteration-time": seconds,
        "throughput/elapsed_ms_per_iteration": seconds * 1000,
        "throughput/samples_per_sec": r["samples_per_s"],
        "throughput/samples_per_sec_per_replica": r["samples_per_s"] / r["data_parallel"],
        "throughput/tokens_per_sec": r["tokens_per_s"],
        "throughput/tokens_per_sec_per_replica": r["tokens_per_s"] / r["data_parallel"],
        "throughput/tokens_per_gpu_per_sec": r["tokens_per_gpu_per_s"],
        # A device does a replica's share of work for one replica only: both figures are the same.
        "throughput/tokens_per_gpu_per_sec_per_replica": r["tokens_per_gpu_per_s"],
        "throughput/tflops": r["tflops_ds"],
        "throughput/tflops-lm": r["tflops_lm"],
        "throughput/tflops-causal": r["tflops_causal"],
        "throughput/tflops-new": r["tflops_lm"] * r["world_size"],
        "throughput/mfu": r["mfu"],
        "throughput/approx_params_in_billions": parameters / 1e9,
        "loss/lm loss": r["loss"],
        "loss/loss_scale": r["loss_scale"],
        "loss/grad_norm": r["grad_norm"],
        "memory/max_gib": r["memory_max_gib"],
        **{f"throughput/{name}": r[name] for name in PIPELINE if name in r},
        **{f"corpus-loss/{corpus}": loss for corpus, loss in r.get("corpus_loss", {}).items()},
    }


def _skip(r: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    return {
        "learning-rate/learning-rate": r["learning_rate"],
        "optimizer/learning_rate": r["learning_rate"],
        "optimizer/consumed_train_tokens": r["consumed_tokens"],
        "training/consumed_samples": r["consumed_samples"],
        "training/consumed_tokens": r["consumed_tokens"],
        "training/skiped_iterations": r["skipped_iterations"],  # spelled as on existing dashboards
    }


def _eval(r: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    group = SPLITS[r["split"]]
    return {f"{group}/lm loss": r["loss"], f"{group}/ppl_lm loss": r["perplexity"]}


def _save(r: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    return {"timers/save-checkpoint-time": r["elapsed_s"]}


TABLE: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "step": _step,
    "skip": _skip,
    "eval": _eval,
    "save": _save,
}

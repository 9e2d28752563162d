"""Records as the loop makes them, for the tests of everything that reads records."""

from __future__ import annotations

from typing import Any


def step(iteration: int, loss: float = 2.0, **changes: Any) -> dict[str, Any]:
    """A step of a run with global batches of 4 samples of 8 tokens on 2 devices, 0.5 s each.

    The rates follow from `elapsed_s`.
    """
    elapsed = changes.get("elapsed_s", 0.5)
    return {
        "event": "step",
        "iteration": iteration,
        "train_iters": 100,
        "time": 1000.0 + iteration,
        "consumed_samples": 4 * iteration,
        "consumed_tokens": 32 * iteration,
        "learning_rate": 1e-3,
        "global_batch_size": 4,
        "seq_length": 8,
        "world_size": 2,
        "data_parallel": 2,
        "skipped_iterations": 0,
        "nan_iterations": 0,
        "steps": 1,
        "loss": loss,
        "grad_norm": 1.0,
        "loss_scale": 1.0,
        "elapsed_s": 0.5,
        "samples_per_s": 4 / elapsed,
        "tokens_per_s": 32 / elapsed,
        "tokens_per_gpu_per_s": 16 / elapsed,
        "tflops_lm": 3.0,
        "tflops_ds": 4.0,
        "tflops_causal": 2.5,
        "mfu": None,
        "memory_max_gib": 1.5,
        **changes,
    }


def skip(iteration: int) -> dict[str, Any]:
    """The record of a skipped step of the same run."""
    names = (
        "iteration",
        "train_iters",
        "time",
        "consumed_samples",
        "consumed_tokens",
        "learning_rate",
        "global_batch_size",
        "seq_length",
        "world_size",
        "data_parallel",
        "nan_iterations",
    )
    whole = step(iteration)
    return {"event": "skip", **{name: whole[name] for name in names}, "skipped_iterations": 1}


def evaluation(iteration: int, loss: float = 2.5) -> dict[str, Any]:
    """An evaluation of the same run."""
    return {
        "event": "eval",
        "iteration": iteration,
        "train_iters": 100,
        "time": 1000.0 + iteration,
        "split": "validation",
        "loss": loss,
        "perplexity": 12.18,
        "accuracy": 0.4375,
        "samples": 80,
        "elapsed_s": 1.25,
        "samples_per_s": 64.0,
    }


def sample(iteration: int) -> dict[str, Any]:
    """A text sampled from the same run."""
    return {
        "event": "sample",
        "iteration": iteration,
        "train_iters": 100,
        "time": 1000.0 + iteration,
        "prompt": "What is",
        "text": " an\n  LLM?",
        "elapsed_s": 0.5,
    }


def save(iteration: int) -> dict[str, Any]:
    """A saved checkpoint of the same run."""
    return {
        "event": "save",
        "iteration": iteration,
        "train_iters": 100,
        "time": 1000.0 + iteration,
        "path": f"runs/x/checkpoints/step-{iteration}",
        "bytes": 3_000_000_000,
        "elapsed_s": 2.0,
    }

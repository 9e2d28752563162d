"""Sophia-G's second gradient: when it is taken, on the step's own inputs against drawn labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron.checkpoint.state import RunState
from megatron.data.loader import StepPlan
from megatron.engine import Engine
from megatron.training.optimizers.sophia import SophiaG, hessian_step, label_draws


@dataclass(frozen=True)
class Curvature:
    """Estimates the diagonal before every `interval`-th step, the first one included.

    Attributes:
        engine: with SophiaG as its optimizer.
        plan: which samples a micro-batch holds.
        interval: steps between two estimates.
        seed: of the drawn labels.
        seq_length: S.
    """

    engine: Engine
    plan: StepPlan
    interval: int
    seed: int
    seq_length: int

    def due(self, iteration: int) -> bool:
        """Whether step `iteration` (1-based) is preceded by an estimate."""
        return (iteration - 1) % self.interval == 0

    def estimate(self, state: RunState, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """Takes the second gradient on the inputs of the step after `state`; weights stay."""
        engine, plan = self.engine, self.plan
        assert isinstance(engine.optimizer, SophiaG)
        drawn = [
            (
                tokens,
                label_draws(
                    self.seed,
                    state.iteration + 1,
                    list(plan.micro_batch(state.consumed_samples, number)),
                    self.seq_length,
                ),
            )
            for number, (tokens, _) in enumerate(micro_batches)
        ]
        tokens_per_step = plan.global_batch_size * self.seq_length
        with engine.unclipped(), hessian_step(engine.optimizer, tokens_per_step):
            engine.train_batch(drawn)

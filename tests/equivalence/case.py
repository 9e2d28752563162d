"""A layout and what else may not change the losses, as the variables of a tiny run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tests.equivalence import front
from tests.equivalence.front import Curve
from tests.spawn import run

GLOBAL_BATCH = 8
LEARNING_RATE = {"fp32": "0.5", "fp16": "0.5", "bf16": "0.1"}  # bf16 rounds, more at higher rates
RECOMPUTE = {"none": "0", "full": "1", "selective": "selective"}


@dataclass(frozen=True)
class Case:
    """A layout and what else may not change the losses.

    Attributes:
        tp, pp, dp, sp: sizes of the axes.
        sequence_parallel: Megatron's, inside the tensor-parallel group.
        kv_heads: key/value heads; 4 fit TP 4.
        zero_stage: as handed to DeepSpeed, 1 to 3.
        tied: tied embeddings.
        gas: micro-batches of a step; the global batch stays the same.
        dtype: fp32, bf16 or fp16.
        recompute: none, selective or full.
        steps: to take.
        optimizer: sgd or adamw.
        engine: auto, sharded or deepspeed.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: int = 1
    sequence_parallel: bool = False
    kv_heads: int = 4
    zero_stage: int = 1
    tied: bool = False
    gas: int = 1
    dtype: str = "fp32"
    recompute: str = "none"
    steps: int = 10
    optimizer: str = "sgd"
    engine: str = "auto"

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp * self.sp

    def variables(self, folder: Path | None = None) -> dict[str, str]:
        """What a user sets for it, with the run's folder where it saves."""
        where = {} if folder is None else {"RUN_DIR": str(folder)}
        return where | {
            "WORLD_SIZE": str(self.world),
            "TP": str(self.tp),
            "PP": str(self.pp),
            "SP": str(self.sp),
            "SEQUENCE_PARALLEL": str(int(self.sequence_parallel)),
            "NUM_KV_HEAD": str(self.kv_heads),
            "NOPE_INTERVAL": "4",
            "ZERO_STAGE": str(self.zero_stage),
            "TIE_EMBEDDINGS": str(int(self.tied)),
            "GLOBAL_BATCH": str(GLOBAL_BATCH),
            "GRAD_ACC_STEPS": str(self.gas),
            "MICRO_BATCH": str(GLOBAL_BATCH // (self.gas * self.dp)),
            "DTYPE": self.dtype,
            "USE_ACTIVATION_CHECKPOINTING": RECOMPUTE[self.recompute],
            "OPT": self.optimizer,
            "ENGINE": self.engine,
            "WEIGHT_DECAY": "0" if self.optimizer == "sgd" else "0.1",
            "LR": LEARNING_RATE[self.dtype] if self.optimizer == "sgd" else "3e-3",
        }

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        names = f"tp{self.tp}-pp{self.pp}-dp{self.dp}-z{self.zero_stage}-{tied}-gas{self.gas}"
        extra = [x for x in (self.dtype, self.recompute) if x not in ("fp32", "none")]
        extra += [f"sp{self.sp}"] * (self.sp > 1) + ["sequence"] * self.sequence_parallel
        extra += [self.engine] * (self.engine != "auto")
        extra += [f"kv{self.kv_heads}"] * (self.kv_heads != 4)
        return "-".join([names, *extra])


def reference(case: Case) -> Case:
    """The one-process case with the same result."""
    serial = {"tp": 1, "pp": 1, "dp": 1, "sp": 1, "sequence_parallel": False, "engine": "auto"}
    return dataclasses.replace(case, **serial, zero_stage=1, gas=1, recompute="none")


def curves(case: Case) -> list[Curve]:
    """All steps of a case, on each rank."""
    return run(front.train, case.world, case.variables(), case.steps, True, timeout=240)


def saved(case: Case, steps: int, folder: Path) -> Curve:
    """Rank 0's first `steps` steps, with a checkpoint after them."""
    return run(front.train_and_save, case.world, case.variables(folder), steps, True)[0][0]


def resumed(case: Case, steps: int, folder: Path) -> list[Curve]:
    """The next `steps` steps on each rank, from the newest checkpoint."""
    return run(front.resume_and_train, case.world, case.variables(folder), steps, True)

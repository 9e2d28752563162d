"""Steps, a checkpoint, and more steps in other processes: what the resume tests run on a rank."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint import store
from megatron.checkpoint.tensors import TensorReader, write_pieces
from megatron.engine import Engine
from megatron.engine.shards import ZeroState
from tests.equivalence.training import Case, build, run_steps


def zero_state(engine: Engine) -> ZeroState:
    tp = engine.groups.tp
    return ZeroState(engine.module, engine.zero_optimizer, engine.optimizer, tp.rank, tp.size)


def train_and_save(case: Case, steps: int, root: str) -> list[tuple[float, float]]:
    """Takes `steps` steps and commits a checkpoint."""
    engine = build(case)
    curve = run_steps(engine, case, 0, steps)
    pieces = zero_state(engine).pieces()
    about = {"loss_scaler": engine.loss_scaler_state()}
    store.save(Path(root), steps, lambda path: write_pieces(path, pieces), about)
    return curve


def resume_and_train(case: Case, root: str, steps: int) -> list[tuple[float, float]]:
    """Takes back the newest checkpoint and goes on for `steps` steps."""
    engine = build(case)
    checkpoint = store.newest_sound(Path(root), print)
    assert checkpoint is not None
    zero_state(engine).load(TensorReader(checkpoint.files("tensors")).for_piece)
    engine.load_loss_scaler_state(checkpoint.manifest["loss_scaler"])
    return run_steps(engine, case, checkpoint.iteration, checkpoint.iteration + steps)

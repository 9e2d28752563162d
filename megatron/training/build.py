"""From one configuration to the things the loop works with: model, engine, data, meter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from megatron.checkpoint.state import RunState
from megatron.config.deepspeed import deepspeed_config
from megatron.config.pipeline_stages import modelled_bubble, stage_bounds
from megatron.config.schedule import schedule
from megatron.config.schema import RunConfig
from megatron.config.skip import is_skipped
from megatron.data.dataset import SampleSource
from megatron.data.loader import Loader, StepPlan, evaluation_loader
from megatron.engine import Engine, EngineOptions, MicroBatches
from megatron.engine.options import LossFunction
from megatron.model.layer import ModelContext
from megatron.parallel.cross_entropy import (
    mean_vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron.parallel.groups import Groups
from megatron.training import checkpointing
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.data import Data, train_data
from megatron.training.device import Device
from megatron.training.loggers import Tracker
from megatron.training.loop import Intervals, Job
from megatron.training.metrics import Meter, Record, Workload
from megatron.training.optimizers.curvature import Curvature
from megatron.training.optimizers.rules import make_optimizer
from megatron.training.optimizers.sophia import SophiaG, with_sampled_labels
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer

log = logging.getLogger(__name__)

RECOMPUTE = {"0": "none", "1": "full", "selective": "selective"}


def model_context(run: RunConfig, groups: Groups) -> ModelContext:
    """How the model's parts are computed on this rank."""
    recompute = RECOMPUTE[run.train.activation_checkpointing]
    # Several blocks to a kept activation are grouped by the engine, one by the block itself.
    if recompute == "full" and run.train.checkpoint_num_layers > 1:
        recompute = "none"
    return ModelContext(
        tp=groups.tp,
        sp=groups.sp,
        seed=run.train.seed,
        recompute=recompute,
        sequence_parallel=run.parallel.megatron_sequence_parallel,
        no_flash_attention=run.train.no_flash_attention,
    )


def build_engine(
    run: RunConfig, groups: Groups, device: Device, corpus_losses: CorpusLosses | None = None
) -> Engine:
    """Model, optimizer and DeepSpeed for this rank; its loss counts into `corpus_losses`."""
    full = run.train.activation_checkpointing == "1"
    layers_kept = run.train.checkpoint_num_layers
    options = EngineOptions(
        deepspeed_config=deepspeed_config(run),
        gradient_accumulation_steps=run.train.gradient_accumulation_steps,
        stage_bounds=stage_bounds(run.stage_blocks),
        device=device.torch_device,
        compile={"0": False, "1": True, "auto": device.kind != "cpu"}[run.train.compile],
        recompute_num_layers=layers_kept if full and layers_kept > 1 else 0,
        mics_shard_size=run.parallel.mics_shard_size,
        pipeline_schedule=run.parallel.pipeline_schedule,
    )
    vocabulary: dict[str, Any] = {"tp": groups.tp, "vocab_size": run.model.vocab_size}
    loss: LossFunction = partial(mean_vocab_parallel_cross_entropy, **vocabulary)
    if corpus_losses is not None:
        loss = corpus_losses.counted(partial(vocab_parallel_cross_entropy, **vocabulary))
    if run.optimizer.optimizer == "sophiag":
        loss = with_sampled_labels(loss, groups.tp, run.model.vocab_size)
    engine = Engine(
        run.architecture.layers(run.model, model_context(run, groups)),
        loss,
        partial(make_optimizer, run.optimizer),
        groups,
        options,
    )
    if isinstance(engine.optimizer, WholeMatrixOptimizer):
        engine.optimizer.bind(
            engine.module.named_parameters(),
            groups.dp_sp,
            groups.tp,
            engine.zero_optimizer,
            run.model.vocab_size,
        )
    return engine


def build_job(
    run: RunConfig, engine: Engine, data: Data, device: Device, tracker: Tracker, state: RunState
) -> Job:
    """What the loop works with, for a run that stands at `state`."""
    groups = engine.groups
    plan = StepPlan(
        run.train.global_batch_size,
        run.train.micro_batch_size,
        run.train.gradient_accumulation_steps,
        groups.dp.rank,
        groups.dp.size,
    )
    train = train_data(run, data, state)
    losses = data.corpus_losses
    intervals = Intervals(
        train_iters=run.train.train_iters,
        log=run.log.log_interval,
        evaluate=run.log.eval_interval,
        save=run.checkpoint.save_interval,
        skip_ranges=state.skip_ranges,
        dump_tokens=run.log.dump_tokens,
        dump_skipped=run.log.dump_skipped_iters,
    )
    reads = groups.pp.rank in (0, groups.pp.size - 1)  # stages between see no tokens
    evaluations = {}
    if run.log.eval_interval > 0:
        for name, split in (("validation", data.splits.valid), ("test", data.splits.test)):
            if split is not None:
                evaluations[name] = partial(
                    _evaluation, split if reads else None, plan, run.log.eval_iters
                )
    return Job(
        engine=engine,
        intervals=intervals,
        schedule=schedule(run.optimizer, run.train.train_iters),
        steps=partial(_read_ahead, train if reads else None, plan, intervals, losses),
        peek=partial(_peek, train, plan),
        evaluations=evaluations,
        save=partial(checkpointing.save, run, engine),
        meter=Meter(
            _workload(run, device),
            device.memory_max_gib,
            device.synchronize,
            measured=partial(_pipeline_record, run, engine),
        ),
        tracker=tracker,
        samples_per_step=run.train.global_batch_size,
        tokens_per_step=run.tokens_per_step,
        curvature=_curvature(run, engine, plan),
        corpus_loss=None if losses is None else partial(losses.take, engine.device),
    )


def _pipeline_record(run: RunConfig, engine: Engine) -> Record:
    """The bubble of the steps since the last record, beside the 1F1B model's; a collective."""
    bubble = engine.pipeline_bubble()
    if bubble is None:
        return {}
    micro_batches = run.train.gradient_accumulation_steps
    model = modelled_bubble(run.parallel.pipeline_parallel, micro_batches)
    return {"pipeline_bubble": bubble, "pipeline_bubble_model": model}


def _curvature(run: RunConfig, engine: Engine, plan: StepPlan) -> Curvature | None:
    if not isinstance(engine.optimizer, SophiaG):
        return None
    interval = run.optimizer.sophia_hessian_interval
    return Curvature(engine, plan, interval, run.train.seed, run.model.seq_length)


def _workload(run: RunConfig, device: Device) -> Workload:
    shape, tp, counts = run.model, run.parallel.tensor_parallel, run.architecture
    return Workload(
        train_iters=run.train.train_iters,
        global_batch_size=run.train.global_batch_size,
        seq_length=run.model.seq_length,
        world_size=run.parallel.world_size,
        data_parallel=run.data_parallel,
        flops_per_token_lm=counts.flops_per_token_lm(shape, tp),
        flops_per_token_ds=counts.flops_per_token_ds(shape, run.train.activation_checkpointing, tp),
        flops_per_token_causal=counts.flops_per_token_causal(shape, tp),
        peak_tflops=device.peak_tflops,
    )


class _StepsOf:
    """Hands out a loader's micro-batches step by step."""

    def __init__(self, loader: Loader, count: int, losses: CorpusLosses | None = None) -> None:
        self._loader = loader
        self._count = count
        self._losses = losses

    def step(self, iteration: int) -> MicroBatches:
        """The micro-batches of `iteration`, which must be the next step read."""
        for batch in islice(self._loader, self._count):
            assert batch.iteration == iteration, f"{batch.iteration=} {iteration=}"
            losses, labels = self._losses, batch.labels
            yield batch.tokens, losses.mark(labels, batch.corpora) if losses else labels


class _NoSteps:
    """For pipeline stages that see no tokens."""

    def step(self, iteration: int) -> MicroBatches:
        """Nothing."""
        del iteration
        return ()


@contextmanager
def _read_ahead(
    dataset: SampleSource | None,
    plan: StepPlan,
    intervals: Intervals,
    losses: CorpusLosses | None,
    state: RunState,
) -> Iterator[_StepsOf | _NoSteps]:
    """The steps after `state` that are not skipped, read ahead by a thread."""
    if dataset is None:
        yield _NoSteps()
        return
    size = plan.global_batch_size
    to_read = (
        (iteration, state.consumed_samples + (iteration - state.iteration - 1) * size)
        for iteration in range(state.iteration + 1, intervals.train_iters + 1)
        if not is_skipped(iteration, intervals.skip_ranges)
    )
    with Loader(dataset, plan, to_read) as loader:
        yield _StepsOf(loader, plan.gradient_accumulation_steps, losses)


def _peek(dataset: SampleSource, plan: StepPlan, state: RunState) -> MicroBatches:
    """The micro-batches of the step after `state`, read at once."""
    with Loader(dataset, plan, [(state.iteration + 1, state.consumed_samples)]) as loader:
        return [(batch.tokens, batch.labels) for batch in loader]


def _evaluation(
    dataset: SampleSource | None, plan: StepPlan, eval_iters: int
) -> Iterator[MicroBatches]:
    """Batches of one evaluation: the same samples each time."""
    if dataset is None:
        yield from [()] * eval_iters
        return
    with evaluation_loader(dataset, plan, eval_iters) as loader:
        steps = _StepsOf(loader, plan.gradient_accumulation_steps)
        for number in range(1, eval_iters + 1):
            yield steps.step(number)

"""One step, one evaluation, one learning rate: all that the training loop asks of DeepSpeed."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn

from megatron.config.pipeline_stages import num_stages_per_rank
from megatron.engine.bubble import StageClock
from megatron.engine.distributed import quiet
from megatron.engine.mics import average_over_replicas, cut_into_shards
from megatron.engine.mpu import ModelParallelUnit
from megatron.engine.options import EngineOptions, LossFunction, MakeOptimizer, MicroBatches
from megatron.engine.own_groups import made_by_members
from megatron.engine.partition_tables import made_in_one_pass
from megatron.engine.pipeline import pipeline_module, reduce_tied_gradients
from megatron.engine.pipeline_norm import sum_stages_once
from megatron.engine.relay import relay
from megatron.engine.shards import refresh_weights
from megatron.engine.zero3 import make_secondary_group, partitioned_initialisation
from megatron.model.layer import Layer
from megatron.model.stack import Stack
from megatron.parallel.groups import Groups
from megatron.parallel.ulysses import all_positions, own_positions

_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Engine:
    """One step, one evaluation, one learning rate: all that the training loop asks of DeepSpeed.

    Attributes:
        module: the local part of the model (the whole of it at PP = 1).
        optimizer: the optimizer made by `make_optimizer`, with DeepSpeed's flat parameters in it.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        loss: LossFunction,
        make_optimizer: MakeOptimizer,
        groups: Groups,
        options: EngineOptions,
    ) -> None:
        # Imported modules live as long as the run: walking them again and again, the collector
        # takes most of the time in which DeepSpeed makes its tables of thousands of ranks.
        gc.freeze()
        self.groups = groups
        self.pipelined = groups.layout.pp > 1
        self._loss = loss
        self._options = options
        if options.compile:
            layers = [_compiled(layer) if layer.recompute else layer for layer in layers]
        # To DeepSpeed the ranks of a sequence are data-parallel ones with other tokens: it shares
        # states out and averages gradients and losses over both.
        merged = groups.without_sequence()
        self._shards = cut_into_shards(merged.dp, options.mics_shard_size)
        make_secondary_group(options.zero.get("zero_hpz_partition_size", 1), merged.dp)
        mpu = None if self.pipelined else ModelParallelUnit(groups.tp, self._shards.shard)
        self._stages_a_rank = num_stages_per_rank(options.pipeline_schedule)
        self.module: nn.Module = self._build(layers, mpu)
        self.optimizer = make_optimizer(self.module.named_parameters())
        with quiet(), made_by_members(), made_in_one_pass():
            self._deepspeed, self.zero_optimizer, _, _ = deepspeed.initialize(
                model=self.module,
                optimizer=self.optimizer,
                config=options.deepspeed_config,
                mpu=mpu,
                dist_init_required=False,
            )
        self._clock: StageClock | None = None
        if self.pipelined:
            sum_stages_once(self.zero_optimizer, options.device)
            self._clock = StageClock(options.device, groups.pp)
            passes = (schedule.ForwardPass, schedule.BackwardPass)
            table = self._deepspeed._INSTRUCTION_MAP
            timed = {kind: self._clock.timed(table[kind]) for kind in passes}
            timed[schedule.ReduceTiedGrads] = reduce_tied_gradients
            self._deepspeed._INSTRUCTION_MAP = {**table, **timed}

    def train_batch(self, micro_batches: MicroBatches) -> Tensor:
        """One optimizer step over `gradient_accumulation_steps` micro-batches.

        Returns:
            The mean loss of the global batch, a scalar on the device, equal on all ranks.
        """
        if self._clock is not None:
            with self._clock:
                loss = self._deepspeed.train_batch(data_iter=iter(self._to_device(micro_batches)))
            return loss.detach().float()
        self.module.train()
        total = torch.zeros((), device=self._options.device)
        for tokens, labels in self._to_device(micro_batches):
            loss = self._loss(self._deepspeed(tokens), labels)
            self._deepspeed.backward(loss)
            if self._deepspeed.is_gradient_accumulation_boundary():
                average_over_replicas(self.zero_optimizer, self._shards.replica)
            self._deepspeed.step()  # updates the weights after the last micro-batch only
            total += loss.detach().float()
        return self._mean_over_data_parallel(total / self._options.gradient_accumulation_steps)

    @torch.no_grad()
    def eval_batch(self, micro_batches: MicroBatches) -> Tensor:
        """The mean loss of one global batch without a step; as many micro-batches as a step has."""
        if self.pipelined:
            loss = self._deepspeed.eval_batch(data_iter=iter(self._to_device(micro_batches)))
            self.module.train()
            return loss.detach().float()
        self.module.eval()
        total = torch.zeros((), device=self._options.device)
        count = 0
        for tokens, labels in self._to_device(micro_batches):
            total += self._loss(self._deepspeed(tokens), labels).float()
            count += 1
        self.module.train()
        return self._mean_over_data_parallel(total / count)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Logits of the last layer, for sampling; a collective over the ranks of a model copy.

        Args:
            tokens: (B, S) int64, equal on all ranks.

        Returns:
            (B, S, V/tp) on the rank of the last stage (`last_stage`), None on the others.
        """
        self.module.eval()
        sp, length = self.groups.sp, tokens.shape[1]
        # Equal pieces for sequence parallelism of both kinds; causal attention never looks right.
        tokens = F.pad(tokens, (0, -length % (sp.size * self.groups.tp.size)))
        tokens = own_positions(tokens.to(self._options.device), sp)
        if self.pipelined:
            output = relay(self.module, self.groups.pp, tokens, self._stages_a_rank)
        else:
            output = self._deepspeed(tokens)
        self.module.train()
        return None if output is None else all_positions(output, sp)[:, :length]

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next step in every parameter group."""
        for group in self.zero_optimizer.param_groups:
            group["lr"] = rate

    def gradient_norm(self) -> Tensor | float:
        """Norm of the last step's gradient over all ranks before clipping; inf on overflow.

        A tensor on the device where DeepSpeed has one, so that asking does not wait for the step.
        """
        return self._deepspeed.get_global_grad_norm()

    @property
    def step_applied(self) -> bool:
        """Whether the last step changed the weights; a non-finite gradient leaves them alone."""
        return bool(self._deepspeed.was_step_applied())

    @property
    def loss_scale(self) -> float:
        """Factor on the fp16 loss; 1 in bf16 and fp32."""
        if not self._deepspeed.fp16_enabled():
            return 1.0
        return float(self.zero_optimizer.loss_scale)

    def refresh_weights(self) -> None:
        """Makes the model's weights again from the optimizer's fp32 ones; a collective."""
        refresh_weights(self.zero_optimizer)

    def loss_scaler_state(self) -> dict[str, float]:
        """The numbers of fp16's loss scaler, for a checkpoint; empty in bf16 and fp32."""
        if not self._deepspeed.fp16_enabled():
            return {}
        scaler = vars(self.zero_optimizer.loss_scaler)
        return {key: scaler[key] for key in _LOSS_SCALER_STATE}

    def load_loss_scaler_state(self, values: dict[str, float]) -> None:
        """Takes back what `loss_scaler_state` gave; nothing where the precision has changed."""
        if values and self._deepspeed.fp16_enabled():
            vars(self.zero_optimizer.loss_scaler).update(values)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._options.device

    def close(self) -> None:
        """Frees hooks and buffers; the process group stays."""
        self._deepspeed.destroy()

    @property
    def replica(self) -> int:
        """Which of MiCS' equal copies of all states this rank is part of; 0 without MiCS."""
        return self._shards.replica.rank

    @property
    def last_stage(self) -> int:
        """Place on the pipeline axis of the rank that has the last stage, and so the logits."""
        return 0 if self._stages_a_rank == 2 else self.groups.pp.size - 1

    def pipeline_bubble(self) -> float | None:
        """Share of the steps since the last call in which a stage computed nothing.

        A collective over the stages; None without a pipeline, or without a step.
        """
        return None if self._clock is None else self._clock.bubble()

    def _build(self, layers: Sequence[Layer], mpu: ModelParallelUnit | None) -> nn.Module:
        if mpu is None:
            merged = self.groups.without_sequence()
            return pipeline_module(layers, self._loss, merged, self._options)
        with quiet(), partitioned_initialisation(self._options.deepspeed_config, mpu):
            return Stack(layers, self._options.recompute_num_layers)

    def _to_device(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's positions of each micro-batch."""
        for micro_batch in micro_batches:
            tokens, labels = (own_positions(x, self.groups.sp) for x in micro_batch)
            yield (
                tokens.to(self._options.device, non_blocking=True),
                labels.to(self._options.device, non_blocking=True),
            )

    def _mean_over_data_parallel(self, value: Tensor) -> Tensor:
        """Of samples and, as all pieces of a sequence are equally long, of their pieces."""
        dp = self.groups.dp_sp
        if dp.group is not None:
            dist.all_reduce(value, group=dp.group)
            value /= dp.size
        return value


def _compiled(layer: Layer) -> Layer:
    """The layer with its module compiled as it is built: one graph serves all blocks."""

    def build() -> nn.Module:
        module = layer.build()
        module.compile()
        return module

    return dataclasses.replace(layer, build=build)

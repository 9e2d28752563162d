"""Bytes that the fullest rank of a layout needs, by part: an estimate made of plain integers.

Activations are the tensors that an eager block keeps for its backward pass, with the fused RMSNorm
of a GPU. Allocator slack and communication buffers are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.pipeline_stages import num_stages_per_rank
from megatron.config.schema import RunConfig
from megatron.config.update_rules import RULES

LOSS_BLOCK = 1 << 24  # logits that the cross entropy turns into fp32 at once


class MemoryEstimate(NamedTuple):
    """Bytes on the device of the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self)


def memory_per_rank(run: RunConfig) -> MemoryEstimate:
    """The estimate of the pipeline rank that needs most."""
    ranks = range(run.parallel.pipeline_parallel)
    return max((_rank(run, rank) for rank in ranks), key=lambda estimate: estimate.total)


def _rank(run: RunConfig, rank: int) -> MemoryEstimate:
    """Bytes of one pipeline rank; the first stage has the embedding, the last norm and head."""
    stages = len(run.stage_blocks)
    own = (
        {rank, stages - 1 - rank}
        if num_stages_per_rank(run.parallel.pipeline_schedule) == 2
        else {rank}
    )
    first, last = 0 in own, stages - 1 in own
    layers = sum(run.stage_blocks[stage] for stage in own)
    tables = 1 if first and last and run.model.tie_embeddings else first + last
    table = tables * run.padded_vocab_size * run.model.hidden_size
    norm = last * run.model.hidden_size
    blocks = layers * run.architecture.layer_parameters(run.model)
    count = -(-(blocks + table + norm) // run.parallel.tensor_parallel)
    return MemoryEstimate(
        weights=_weights(count, run),
        gradients=_gradients(count, run),
        optimizer=_optimizer(count, -(-table // run.parallel.tensor_parallel), run),
        activations=_activations(run, layers, _in_flight(run, rank) / len(own)),
        logits=_logits(run) if last else 0,
    )


def _in_flight(run: RunConfig, rank: int) -> int:
    """Micro-batches in flight on a rank, summed over its stages."""
    stages, steps = len(run.stage_blocks), run.train.gradient_accumulation_steps
    if num_stages_per_rank(run.parallel.pipeline_schedule) == 2:
        return min(2 * steps, stages + 1)
    return min(steps, stages - rank)  # 1F1B: one for each stage from it to the last


def _value_bytes(run: RunConfig) -> int:
    """Bytes of one weight or activation."""
    return 4 if run.train.dtype == "fp32" else 2


def _shard(amount: int, run: RunConfig, from_stage: int) -> int:
    """A rank's part of an amount that ZeRO shards from `from_stage` on; stage 0 runs as 1."""
    sharded = max(run.parallel.zero_stage, 1) >= from_stage
    return -(-amount // run.zero_ranks) if sharded else amount


def _tokens(run: RunConfig) -> int:
    """Positions that a rank holds of one micro-batch."""
    return run.train.micro_batch_size * -(-run.model.seq_length // run.parallel.sequence_parallel)


def _weights(count: int, run: RunConfig) -> int:
    amount = count * _value_bytes(run)
    hpz = run.parallel.zero_hpz_partition_size
    return _shard(amount, run, from_stage=3) + (-(-amount // hpz) if hpz > 1 else 0)


def _gradients(count: int, run: RunConfig) -> int:
    """Gradients as produced; bf16 below stage 2 also accumulates them in fp32."""
    accumulated = 4 * count if run.train.dtype == "bf16" and run.parallel.zero_stage <= 1 else 0
    return _shard(count * _value_bytes(run), run, from_stage=2) + accumulated


def _optimizer(count: int, table: int, run: RunConfig) -> int:
    """fp32 master weights and the states of the update rule; `table` of `count` are vocabulary."""
    if run.parallel.cpu_optimizer:
        return 0
    numbers = (1 + RULES[run.optimizer.optimizer].states) * count
    if run.optimizer.optimizer == "muon":  # embedding and head are AdamW's
        numbers += table
    return _shard(4 * numbers, run, from_stage=1)


def _activations(run: RunConfig, layers: int, micro_batches: float) -> int:
    """Bytes that `layers` blocks keep for `micro_batches`, and those recomputed at once."""
    if layers == 0:  # a last stage may have the head alone
        return 0
    recompute = run.train.activation_checkpointing
    group = min(layers, run.train.checkpoint_num_layers) if recompute == "1" else 1
    kept = _block(run, recompute)
    return int(micro_batches * -(-layers // group) * kept) + group * _block(run, "0") - kept


def _block(run: RunConfig, recompute: str) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass.

    In values per token. Inputs and outputs of the two norms are replicated over the TP ranks, or
    sharded with Megatron's sequence parallelism; the rest is always sharded over them: rotated q
    and k, v and the attention's output, gate, up, silu(gate) and its product with up.
    """
    h, f = run.model.hidden_size, run.model.ffn_hidden_size
    q, d = run.model.query_size, run.model.key_value_size
    width, scores = _value_bytes(run), 0
    norms, sharded = {"0": (4 * h, 2 * q + 2 * d + 4 * f), "1": (h, 0)}.get(
        recompute, (4 * h, q + 2 * d + 2 * f)
    )
    if recompute == "0" and run.train.no_flash_attention:
        # The plain kernel works in fp32: every head's q, k and v, and the scores of all positions.
        sharded -= q + 2 * d
        scores = 4 * (3 * q + run.model.num_attention_heads * run.model.seq_length)
    tp = run.parallel.tensor_parallel
    norm_ranks = tp if run.parallel.megatron_sequence_parallel else 1
    per_token = -(-width * norms // norm_ranks) + -(-(width * sharded + scores) // tp)
    return _tokens(run) * per_token


def _logits(run: RunConfig) -> int:
    """Logits and their gradient in the model's precision, and two fp32 blocks of the loss."""
    logits = _tokens(run) * (run.padded_vocab_size // run.parallel.tensor_parallel)
    return 2 * logits * _value_bytes(run) + 4 * min(logits, 2 * LOSS_BLOCK)

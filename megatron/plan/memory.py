"""Bytes that the fullest rank of a layout needs, by part: an estimate made of plain integers.

Activations follow the shapes that an eager block keeps for its backward pass; the logits are those
of a head that holds them whole. Allocator slack and communication buffers are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.pipeline_stages import num_stages_per_rank
from megatron.config.schema import RunConfig

# Numbers kept per parameter beside the fp32 master weight. Source: the update rules themselves.
OPTIMIZER_STATES = {"sgd": 1, "muon": 1, "adafactor": 0}


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
        activations=_in_flight(run, rank) * _activations(run, layers) // len(own),
        logits=_logits(run) if last else 0,
    )


def _in_flight(run: RunConfig, rank: int) -> int:
    """Micro-batches that a rank's stages keep at once, each stage's own counted."""
    stages, steps = len(run.stage_blocks), run.train.gradient_accumulation_steps
    if num_stages_per_rank(run.parallel.pipeline_schedule) == 2:
        return min(2 * steps, stages + 1)
    return min(steps, stages - rank)  # 1F1B: one for each stage from it to the last


def _value_bytes(run: RunConfig) -> int:
    """Bytes of one weight or activation."""
    return 4 if run.train.dtype == "fp32" else 2


def _share(amount: int, run: RunConfig, from_stage: int) -> int:
    """What a rank keeps of an amount that ZeRO shares out from a stage on; 0 runs as 1."""
    shared = max(run.parallel.zero_stage, 1) >= from_stage
    return -(-amount // run.zero_ranks) if shared else amount


def _tokens(run: RunConfig) -> int:
    """Positions that a rank holds of one micro-batch."""
    return run.train.micro_batch_size * -(-run.model.seq_length // run.parallel.sequence_parallel)


def _weights(count: int, run: RunConfig) -> int:
    amount = count * _value_bytes(run)
    hpz = run.parallel.zero_hpz_partition_size
    return _share(amount, run, from_stage=3) + (-(-amount // hpz) if hpz > 1 else 0)


def _gradients(count: int, run: RunConfig) -> int:
    """Gradients as produced; bf16 below stage 2 also accumulates them in fp32."""
    accumulated = 4 * count if run.train.dtype == "bf16" and run.parallel.zero_stage <= 1 else 0
    return _share(count * _value_bytes(run), run, from_stage=2) + accumulated


def _optimizer(count: int, table: int, run: RunConfig) -> int:
    """fp32 master weights and the states of the update rule; `table` of `count` are vocabulary."""
    if run.parallel.cpu_optimizer:
        return 0
    numbers = (1 + OPTIMIZER_STATES.get(run.optimizer.optimizer, 2)) * count
    if run.optimizer.optimizer == "muon":  # embedding and head are AdamW's
        numbers += table
    return _share(4 * numbers, run, from_stage=1)


def _activations(run: RunConfig, layers: int) -> int:
    """What the blocks of one stage keep of one micro-batch."""
    tokens = _tokens(run)
    per_value = _value_bytes(run)
    h, f = run.model.hidden_size, run.model.ffn_hidden_size
    q, d = run.model.query_size, run.model.key_value_size
    # In values a token: inputs and outputs of the two norms stay whole, unless Megatron's sequence
    # parallelism cuts them; q, the attention's output and its projection, k and v, gate, up,
    # activation and product are cut over TP ranks.
    whole, cut = 4 * h, h + 2 * q + 2 * d + 4 * f
    if run.train.activation_checkpointing == "selective":
        whole, cut = 2 * h, h + 2 * q + 2 * d + 3 * f
    norms = run.parallel.tensor_parallel if run.parallel.megatron_sequence_parallel else 1
    block = tokens * per_value * (-(-whole // norms) + -(-cut // run.parallel.tensor_parallel))
    if run.train.activation_checkpointing == "1":
        group = min(layers, run.train.checkpoint_num_layers)
        kept = -(-layers // group) * tokens * per_value * -(-h // norms)
        return kept + group * block
    return layers * block


def _logits(run: RunConfig) -> int:
    """Logits in the model's precision, in fp32, their softmax and one copy in the backward pass."""
    columns = run.padded_vocab_size // run.parallel.tensor_parallel
    per_logit = 12 if run.train.dtype == "fp32" else 14
    return _tokens(run) * columns * per_logit

"""Bytes that the fullest rank of a layout needs, by part: an estimate made of plain integers.

Activations follow the shapes that an eager block keeps for its backward pass; the logits are those
of a head that holds them whole. Allocator slack and communication buffers are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.formulas import Shape, layer_parameters

# Numbers kept per parameter beside the fp32 master weight. Source: the update rules themselves.
OPTIMIZER_STATES = {"sgd": 1, "muon": 1, "adafactor": 0}


class Layout(NamedTuple):
    """How a model is cut and run, as far as memory depends on it."""

    tensor_parallel: int
    stage_blocks: tuple[int, ...]  # two stages a rank, r and the r-th from the end, with dualpipev
    stages_a_rank: int
    zero_ranks: int
    zero_hpz_partition_size: int
    sequence_parallel: int
    megatron_sequence_parallel: bool
    zero_stage: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    dtype: str
    optimizer: str
    activation_checkpointing: str
    checkpoint_num_layers: int
    cpu_optimizer: bool


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


def memory_per_rank(shape: Shape, layout: Layout) -> MemoryEstimate:
    """The estimate of the pipeline rank that needs most."""
    ranks = len(layout.stage_blocks) // layout.stages_a_rank
    return max((_rank(shape, layout, rank) for rank in range(ranks)), key=lambda rank: rank.total)


def _rank(shape: Shape, layout: Layout, rank: int) -> MemoryEstimate:
    """Bytes of one pipeline rank; the first stage has the embedding, the last norm and head."""
    stages = len(layout.stage_blocks)
    own = {rank, stages - 1 - rank} if layout.stages_a_rank == 2 else {rank}
    first, last = 0 in own, stages - 1 in own
    layers = sum(layout.stage_blocks[stage] for stage in own)
    tables = 1 if first and last and shape.tie_embeddings else first + last
    table = tables * shape.padded_vocab_size * shape.hidden_size
    norm = last * shape.hidden_size
    count = -(-(layers * layer_parameters(shape) + table + norm) // layout.tensor_parallel)
    return MemoryEstimate(
        weights=_weights(count, layout),
        gradients=_gradients(count, layout),
        optimizer=_optimizer(count, -(-table // layout.tensor_parallel), layout),
        activations=_in_flight(layout, rank) * _activations(shape, layout, layers) // len(own),
        logits=_logits(shape, layout) if last else 0,
    )


def _in_flight(layout: Layout, rank: int) -> int:
    """Micro-batches that a rank's stages keep at once, each stage's own counted."""
    stages, steps = len(layout.stage_blocks), layout.gradient_accumulation_steps
    if layout.stages_a_rank == 2:
        return min(2 * steps, stages + 1)
    return min(steps, stages - rank)  # 1F1B: one for each stage from it to the last


def _value_bytes(layout: Layout) -> int:
    """Bytes of one weight or activation."""
    return 4 if layout.dtype == "fp32" else 2


def _share(amount: int, layout: Layout, from_stage: int) -> int:
    """What a rank keeps of an amount that ZeRO shares out from a stage on; 0 runs as 1."""
    shared = max(layout.zero_stage, 1) >= from_stage
    return -(-amount // layout.zero_ranks) if shared else amount


def _tokens(shape: Shape, layout: Layout) -> int:
    """Positions that a rank holds of one micro-batch."""
    return layout.micro_batch_size * -(-shape.seq_length // layout.sequence_parallel)


def _weights(count: int, layout: Layout) -> int:
    amount = count * _value_bytes(layout)
    hpz = layout.zero_hpz_partition_size
    return _share(amount, layout, from_stage=3) + (-(-amount // hpz) if hpz > 1 else 0)


def _gradients(count: int, layout: Layout) -> int:
    """Gradients as produced; bf16 below stage 2 also accumulates them in fp32."""
    accumulated = 4 * count if layout.dtype == "bf16" and layout.zero_stage <= 1 else 0
    return _share(count * _value_bytes(layout), layout, from_stage=2) + accumulated


def _optimizer(count: int, table: int, layout: Layout) -> int:
    """fp32 master weights and the states of the update rule; `table` of `count` are vocabulary."""
    if layout.cpu_optimizer:
        return 0
    numbers = (1 + OPTIMIZER_STATES.get(layout.optimizer, 2)) * count
    if layout.optimizer == "muon":  # embedding and head are AdamW's
        numbers += table
    return _share(4 * numbers, layout, from_stage=1)


def _activations(shape: Shape, layout: Layout, layers: int) -> int:
    """What the blocks of one stage keep of one micro-batch."""
    tokens = _tokens(shape, layout)
    per_value = _value_bytes(layout)
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.key_value_size
    # In values a token: inputs and outputs of the two norms stay whole, unless Megatron's sequence
    # parallelism cuts them; q, the attention's output and its projection, k and v, gate, up,
    # activation and product are cut over TP ranks.
    whole, cut = 4 * h, 3 * h + 2 * d + 4 * f
    if layout.activation_checkpointing == "selective":
        whole, cut = 2 * h, 3 * h + 2 * d + 3 * f
    norms = layout.tensor_parallel if layout.megatron_sequence_parallel else 1
    block = tokens * per_value * (-(-whole // norms) + -(-cut // layout.tensor_parallel))
    if layout.activation_checkpointing == "1":
        group = min(layers, layout.checkpoint_num_layers)
        kept = -(-layers // group) * tokens * per_value * -(-h // norms)
        return kept + group * block
    return layers * block


def _logits(shape: Shape, layout: Layout) -> int:
    """Logits in the model's precision, in fp32, their softmax and one copy in the backward pass."""
    columns = shape.padded_vocab_size // layout.tensor_parallel
    per_logit = 12 if layout.dtype == "fp32" else 14
    return _tokens(shape, layout) * columns * per_logit

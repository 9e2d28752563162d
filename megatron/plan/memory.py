"""Bytes that the fullest rank of a layout needs at its peak, by part: made of plain integers.

A step has five moments that may be its peak: the loss, the first gradient of the backward pass
(the head's), a layer that is computed again, the last gradient (the embedding's), and the
reduction of all. Activations are the tensors that an eager block keeps, with the fused RMSNorm of
a GPU. The allocator's slack and the workspaces of kernels and collectives are not in it.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.deepspeed import LARGEST_BUCKET, engine_zero_stage
from megatron.config.pipeline_stages import num_stages_per_rank
from megatron.config.schema import RunConfig
from megatron.config.update_rules import RULES
from megatron.plan.reductions import gradient_moments

GIB = 2**30
CHUNK_BYTES, CHUNK_TOKENS = 1 << 29, 1 << 10  # of logits that the head makes at once
LOSS_BLOCK = 1 << 25  # of them, that it turns into fp32 at once
FLAT_BUCKET = 500_000_000  # fp32 gradients that DeepSpeed's bf16 optimizer flattens to reduce them
LIVE_PARAMETERS = 3_000_000_000  # that ZeRO-3 keeps gathered


class MemoryEstimate(NamedTuple):
    """Bytes on the device of the fullest rank, at its peak.

    Attributes:
        weights: of the model in the precision of the run; under ZeRO-3 this rank's partitions.
        gradients: those that outlive a micro-batch.
        optimizer: fp32 weights and the states of the update rule.
        activations: what blocks keep for the backward pass, and compute again in it.
        logits: a chunk of them, and the gradients that the head forms from it.
        buffers: DeepSpeed's: buckets, gathered parameters, gradients on their way.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self)


class _Part(NamedTuple):
    """What one pipeline rank holds of the model; numbers of parameters after tensor parallelism."""

    layers: int
    parameters: int
    table: int  # of them, vocabulary
    largest: int  # parameters of its largest matrix
    deepest: int  # of the largest of those whose gradients come first: the head, or a block's
    last: bool


def memory_per_rank(run: RunConfig) -> MemoryEstimate:
    """The estimate of the pipeline rank that needs most."""
    ranks = range(run.parallel.pipeline_parallel)
    return max((_rank(run, rank) for rank in ranks), key=lambda estimate: estimate.total)


def _rank(run: RunConfig, rank: int) -> MemoryEstimate:
    """Bytes of one pipeline rank at the moment of its peak."""
    part = _part(run, _own(run, rank))
    weights, optimizer = (
        _weights(part.parameters, run),
        _optimizer(part.parameters, part.table, run),
    )
    in_flight = _in_flight(run, rank)
    kept, again = _activations(run, part, in_flight)
    logits = _logits(run) if part.last else 0
    others = int(kept * (1 - 1 / in_flight))  # of the micro-batches behind this one
    held = ((kept, logits), (kept, 0), (others, 0), (kept + again, 0), (0, 0))
    moments = (
        (gradients, *of_model, buffers)
        for (gradients, buffers), of_model in zip(_moments(part, run), held, strict=True)
    )
    gradients, activations, logits, buffers = max(moments, key=sum)
    return MemoryEstimate(weights, gradients, optimizer, activations, logits, buffers)


def _moments(part: _Part, run: RunConfig) -> list[tuple[int, int]]:
    """(gradients, buffers) at the loss, the first and the last gradient, in a block, at the end."""
    if run.sharded is not None:
        tied = run.model.tie_embeddings
        table = part.table if tied else part.table // 2
        found = gradient_moments(run.sharded, run.zero_ranks, part.parameters, table, tied=tied)
        return [(gradients, 0) for gradients in found]
    standing, produced = _gradients(part.parameters, run)
    resident, per_parameter, at_end = _buffers(part, run)
    # From the second micro-batch on, the gradients of the first are there at the loss.
    before = produced if run.train.gradient_accumulation_steps > 1 else 0
    return [
        (standing + before, resident),
        (standing + before, resident + per_parameter * part.deepest),
        (standing + produced, resident + per_parameter * part.largest),
        (standing + before, resident),
        (standing + produced, resident + at_end),
    ]


def _own(run: RunConfig, rank: int) -> set[int]:
    """The stages of a pipeline rank."""
    two = num_stages_per_rank(run.parallel.pipeline_schedule) == 2
    return {rank, len(run.stage_blocks) - 1 - rank} if two else {rank}


def _part(run: RunConfig, own: set[int]) -> _Part:
    """The stages `own`: the first has the embedding, the last norm and head."""
    model, tp = run.model, run.parallel.tensor_parallel
    first, last = 0 in own, len(run.stage_blocks) - 1 in own
    layers = sum(run.stage_blocks[stage] for stage in own)
    tables = 1 if first and last and model.tie_embeddings else first + last
    one = run.padded_vocab_size * model.hidden_size
    blocks = layers * run.architecture.layer_parameters(model)
    ends = first * run.architecture.first_parameters(model)
    ends += last * run.architecture.norm_parameters(model)
    count = blocks + tables * one + ends
    in_block = model.hidden_size * max(model.ffn_hidden_size, model.query_size)
    deepest = max(one if last else 0, in_block if layers else 0)
    largest = max(one if tables else 0, deepest)
    count, table, largest, deepest = (
        -(-number // tp) for number in (count, tables * one, largest, deepest)
    )
    return _Part(layers, count, table, largest, deepest, last)


def _in_flight(run: RunConfig, rank: int) -> float:
    """Micro-batches that a layer of a rank has in flight, the mean over its layers."""
    stages, steps = len(run.stage_blocks), run.train.gradient_accumulation_steps
    # One for each stage from a stage to the last, in 1F1B and on both legs of DualPipeV.
    flights = {stage: min(steps, stages - stage) for stage in _own(run, rank)}
    layers = sum(run.stage_blocks[stage] for stage in flights)
    if layers == 0:
        return max(flights.values())
    return sum(run.stage_blocks[stage] * flight for stage, flight in flights.items()) / layers


def _value_bytes(run: RunConfig) -> int:
    """Bytes of one weight or activation."""
    return 4 if run.train.dtype == "fp32" else 2


def _shard(amount: int, run: RunConfig, from_stage: int) -> int:
    """A rank's part of an amount that ZeRO shards from `from_stage` on."""
    sharded = engine_zero_stage(run) >= from_stage
    return -(-amount // run.zero_ranks) if sharded else amount


def _tokens(run: RunConfig) -> int:
    """Positions that a rank holds of one micro-batch."""
    return run.train.micro_batch_size * -(-run.model.seq_length // run.parallel.sequence_parallel)


def _weights(count: int, run: RunConfig) -> int:
    amount = count * _value_bytes(run)
    hpz = run.parallel.zero_hpz_partition_size
    return _shard(amount, run, from_stage=3) + (-(-amount // hpz) if hpz > 1 else 0)


def _adds_in_fp32(run: RunConfig) -> bool:
    """Whether DeepSpeed's bf16 optimizer adds gradients up in fp32 and frees them as it does."""
    offloads = run.parallel.cpu_optimizer
    return run.train.dtype == "bf16" and engine_zero_stage(run) == 1 and not offloads


def _gradients(count: int, run: RunConfig) -> tuple[int, int]:
    """Gradients that always stand, and those that a backward pass leaves behind."""
    if _adds_in_fp32(run):
        return 4 * count, 0
    produced = _shard(count * _value_bytes(run), run, from_stage=2)
    return (produced, 0) if engine_zero_stage(run) == 3 else (0, produced)


def _buffers(part: _Part, run: RunConfig) -> tuple[int, int, int]:
    """Buffers that stand, bytes for each parameter of a new gradient, and those of the step."""
    width, count, stage = _value_bytes(run), part.parameters, engine_zero_stage(run)
    in_fp32 = run.train.dtype == "bf16" and not run.train.grad_reduce_in_bf16
    if _adds_in_fp32(run):
        flat = min(count, FLAT_BUCKET + part.largest)
        return 0, width + 4, (4 if in_fp32 else 6) * flat
    bucket = min(LARGEST_BUCKET, -(-run.parameters // run.parallel.tensor_parallel))
    new = width + 4 * in_fp32
    step = 4 * _shard(count, run, from_stage=1)  # the gradients of this rank's part, in fp32
    if stage == 1:
        averaged = _shard(width * count, run, from_stage=1)
        return width * bucket, new, averaged + max(0, step - width * bucket)  # which is free then
    if stage == 2:
        return 0, new, new * bucket + step
    gathered = width * min(count, LIVE_PARAMETERS)
    return gathered + 2 * width * bucket, new, 4 * in_fp32 * bucket + step


def _optimizer(count: int, table: int, run: RunConfig) -> int:
    """fp32 master weights and the states of the update rule; `table` of `count` are vocabulary."""
    if run.parallel.cpu_optimizer:
        return 0
    # In fp32 the sharded engine updates the model's weights themselves.
    copies = 0 if run.sharded is not None and run.train.dtype == "fp32" else 1
    numbers = (copies + RULES[run.optimizer.optimizer].states) * count
    if run.optimizer.optimizer == "muon":  # embedding and head are AdamW's
        numbers += table
    return _shard(4 * numbers, run, from_stage=1)


def _activations(run: RunConfig, part: _Part, micro_batches: float) -> tuple[int, int]:
    """Bytes that the blocks of a rank keep for `micro_batches`, and those computed again at once.

    The last stage also keeps the final norm's input and output, of one micro-batch; a pipeline
    keeps what it sends, and two tensors on their way.
    """
    norm_ranks = run.parallel.tensor_parallel if run.parallel.megatron_sequence_parallel else 1
    state = -(-_tokens(run) * _value_bytes(run) * run.model.hidden_size // norm_ranks)
    ends = 2 * state if part.last else 0
    if run.parallel.pipeline_parallel > 1:
        ends += int((micro_batches + 2) * state)
    if part.layers == 0:  # a last stage may have the head alone
        return ends, 0
    recompute = run.train.activation_checkpointing
    group = min(part.layers, run.train.checkpoint_num_layers) if recompute == "1" else 1
    kept = _block(run, recompute)
    held = int(micro_batches * -(-part.layers // group) * kept)
    return held + ends, group * _block(run, "0") - kept


def _block(run: RunConfig, recompute: str) -> int:
    """Bytes that one block keeps of one micro-batch for its backward pass.

    In values per token. Inputs and outputs of the two norms are replicated over the TP ranks, or
    sharded with Megatron's sequence parallelism; the rest is always sharded over them: rotated q
    and k, v and the attention's output, gate, up, silu(gate) and its product with up (or up and
    gelu(up)).
    """
    h, f = run.model.hidden_size, run.model.ffn_hidden_size
    q, d = run.model.query_size, run.model.key_value_size
    width, scores = _value_bytes(run), 0
    wide = (run.architecture.mlp_matrices - 1) * f  # what the MLP's last product is made of
    norms, sharded = {"0": (4 * h, 2 * q + 2 * d + 2 * wide), "1": (h, 0)}.get(
        recompute, (4 * h, q + 2 * d + wide)
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
    """What the head's loss makes: logits, blocks of them in fp32, and the gradients it forms.

    These are of the weight and of the hidden states, all positions of them.
    """
    columns = run.padded_vocab_size // run.parallel.tensor_parallel
    width, tokens, hidden = _value_bytes(run), _tokens(run), run.model.hidden_size
    fp16 = run.train.dtype == "fp16"
    chunk = min(
        tokens, CHUNK_TOKENS if fp16 else max(CHUNK_TOKENS, CHUNK_BYTES // (columns * width))
    )
    chunk = -(-tokens // -(-tokens // chunk)) * columns  # equal ones
    blocks = 4 * min(chunk, LOSS_BLOCK) * (1 if run.train.dtype == "fp32" else 2)
    gathers = run.parallel.megatron_sequence_parallel and run.parallel.tensor_parallel > 1
    states = tokens * hidden * width * (2 if gathers else 1)
    if fp16:  # the weight's gradient is added up in fp32, a product at a time
        return width * chunk + max(blocks, width * columns * hidden) + states + 4 * columns * hidden
    return width * chunk + blocks + states + width * columns * hidden

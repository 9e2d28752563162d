"""What makes a configuration wrong, each with the user's own variable, the arithmetic and a fix.

Checks are generators of messages, so that a user sees everything that is wrong at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.config import optimizers, rope_scaling
from megatron.config.errors import ConfigError
from megatron.config.option import Draft
from megatron.config.pipeline_stages import num_stages_per_rank, parse_cuts
from megatron.model.registry import ARCHITECTURES

TP, PP, SP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel"
MEGATRON_SP = "parallel.megatron_sequence_parallel"
ZERO, WORLD = "parallel.zero_stage", "parallel.world_size"
HOSTS = "launch.num_hosts"
SCHEDULE, CUTS = "parallel.pipeline_schedule", "parallel.pipeline_cuts"
HEADS, KV_HEADS = "model.num_attention_heads", "model.num_key_value_heads"
ARCHITECTURE, HEAD_DIM = "model.architecture", "model.head_dim"
HIDDEN, FFN, LAYERS = "model.hidden_size", "model.ffn_hidden_size", "model.num_layers"
LENGTH = "model.seq_length"


def model_parallel_size(draft: Draft) -> int:
    """Ranks that hold one replica of the model: TP x PP x SP."""
    return math.prod(draft.get(key) for key in (TP, PP, SP))


def divides(draft: Draft, part: str, *wholes: str) -> Iterator[str]:
    """The option `part` must divide every option of `wholes`."""
    divisor = draft.get(part)
    common = math.gcd(*(draft.get(whole) for whole in wholes))
    fitting = next(d for d in range(divisor, 0, -1) if common % d == 0)
    for whole in wholes:
        number = draft.get(whole)
        if number % divisor:
            yield (
                f"{draft.show(part)} does not divide {draft.show(whole)}: {number} / {divisor} "
                f"leaves {number % divisor}. Set {draft.name(part)}={fitting}, or "
                f"{draft.name(whole)}={-(-number // divisor) * divisor}"
            )


def check_shape(draft: Draft) -> Iterator[str]:
    """Heads divide the width unless theirs is given, and key/value heads the query heads."""
    width, rest = draft.get(HEAD_DIM), 0
    if width is None:
        yield from divides(draft, HEADS, HIDDEN)
        width, rest = divmod(draft.get(HIDDEN), draft.get(HEADS))
    yield from divides(draft, KV_HEADS, HEADS)
    if width % 2 and draft.get(HEAD_DIM):
        yield (
            f"{draft.show(HEAD_DIM)} is odd, but rotary embeddings rotate pairs: set "
            f"{draft.name(HEAD_DIM)}={width + 1}"
        )
    elif width % 2 and rest == 0:
        yield (
            f"{draft.show(HIDDEN)} / {draft.show(HEADS)} = {width} is odd, but rotary "
            f"embeddings rotate pairs: set {draft.name(HIDDEN)}={draft.get(HEADS) * (width + 1)}"
        )
    for field, value in ARCHITECTURES[draft.get(ARCHITECTURE)].fixed.items():
        key = f"model.{field}"
        if draft.get(key) != value:
            yield (
                f"{draft.show(key)}, but {draft.show(ARCHITECTURE)} has {value} only: set "
                f"{draft.name(key)}={value}, or another {draft.name(ARCHITECTURE)}"
            )
    scaling = draft.get("model.rope_scaling")
    if scaling is not None:
        try:
            rope_scaling.parse(scaling, draft.name("model.rope_scaling"))
        except ConfigError as error:
            yield str(error)


def check_tensor_parallel(draft: Draft) -> Iterator[str]:
    """Every matrix is sharded evenly."""
    yield from divides(draft, TP, HEADS, KV_HEADS, HIDDEN, FFN)


def check_sequence_parallel(draft: Draft) -> Iterator[str]:
    """Both kinds of sequence parallelism divide the sequence evenly, Ulysses the heads too."""
    tp, sp, heads, length = (draft.get(key) for key in (TP, SP, HEADS, LENGTH))
    if sp > 1 and heads % tp == 0 and heads % (tp * sp):
        fitting = next(size for size in range(sp, 0, -1) if heads // tp % size == 0)
        yield (
            f"{draft.show(TP)} x {draft.show(SP)} does not divide {draft.show(HEADS)}: {heads} / "
            f"{tp * sp} leaves {heads % (tp * sp)}. Each rank computes "
            f"the attention of some heads: set {draft.name(SP)}={fitting}, or "
            f"{draft.name(HEADS)}={-(-heads // (tp * sp)) * tp * sp}"
        )
    sharded = draft.get(MEGATRON_SP) and tp > 1
    ranks = sp * tp if sharded else sp
    if length % ranks:
        names = f"{draft.show(SP)} x {draft.show(TP)}" if sharded else draft.show(SP)
        why = f" ({draft.name(MEGATRON_SP)} also shards it over the TP ranks)" if sharded else ""
        yield (
            f"{names} does not divide {draft.show(LENGTH)}: {length} / {ranks} leaves "
            f"{length % ranks}{why}. Set {draft.name(LENGTH)}={-(-length // ranks) * ranks}"
        )


def check_pipeline(draft: Draft) -> Iterator[str]:
    """At least one layer per stage, and a ZeRO stage that the pipeline engine supports."""
    stages, layers, zero = draft.get(PP), draft.get(LAYERS), draft.get(ZERO)
    if layers < stages:
        yield (
            f"{draft.show(PP)} stages need at least one layer each, but {draft.show(LAYERS)}: "
            f"{layers} < {stages}. Set {draft.name(PP)}={layers} or less, or "
            f"{draft.name(LAYERS)}={stages} or more"
        )
    if stages > 1 and zero > 1:
        yield (
            f"{draft.show(ZERO)} does not work with {draft.show(PP)}: ZeRO 2 and 3 shard "
            "gradients after every micro-batch, a pipeline accumulates them over the step. Set "
            f"{draft.name(ZERO)}=1, or {draft.name(PP)}=1"
        )
    yield from _check_schedule(draft)
    yield from _check_cuts(draft)
    kept = draft.get("train.checkpoint_num_layers")
    if draft.get("train.activation_checkpointing") == "1" and kept > max(1, layers // stages):
        yield (
            f"{draft.show('train.checkpoint_num_layers')} is more than the layers of a pipeline "
            f"stage: {draft.show(LAYERS)} / {draft.show(PP)} = {layers // stages}"
        )


def _check_schedule(draft: Draft) -> Iterator[str]:
    """DualPipeV has two stages per rank."""
    stages, layers = draft.get(PP), draft.get(LAYERS)
    if num_stages_per_rank(draft.get(SCHEDULE)) == 1:
        return
    if stages == 1:
        yield (
            f"{draft.show(SCHEDULE)} is a pipeline schedule, but {draft.show(PP)}. Set "
            f"{draft.name(PP)}=2 or more, or unset {draft.name(SCHEDULE)}"
        )
    if layers < 2 * stages:
        yield (
            f"{draft.show(SCHEDULE)} splits the model into 2 x {draft.show(PP)} = {2 * stages} "
            f"stages, but {draft.show(LAYERS)}. Set {draft.name(PP)}={max(1, layers // 2)} or less"
        )


def check_accumulation(draft: Draft) -> Iterator[str]:
    """DualPipeV fills its two directions with micro-batches."""
    least, accumulation = 2 * draft.get(PP), "train.gradient_accumulation_steps"
    if num_stages_per_rank(draft.get(SCHEDULE)) == 2 and draft.get(accumulation) < least:
        yield (
            f"{draft.show(SCHEDULE)} needs 2 x {draft.show(PP)} = {least} micro-batches per step, "
            f"but {draft.show(accumulation)}. Set {draft.name(accumulation)}={least} or more, or "
            f"unset {draft.name(SCHEDULE)}"
        )


def _check_cuts(draft: Draft) -> Iterator[str]:
    """The layers per stage add up to the model."""
    text, layers = draft.get(CUTS), draft.get(LAYERS)
    if not text:
        return
    try:
        blocks = parse_cuts(text, draft.name(CUTS))
    except ConfigError as error:
        yield str(error)
        return
    each = num_stages_per_rank(draft.get(SCHEDULE))
    stages = draft.get(PP) * each
    if len(blocks) != stages:
        doubled = " x 2 (dualpipev)" if each == 2 else ""
        yield (
            f"{draft.show(CUTS)} names {len(blocks)} stages, but {draft.show(PP)}{doubled} = "
            f"{stages}. Give {stages} numbers"
        )
    elif sum(blocks) != layers:
        yield (
            f"{draft.show(CUTS)} has {' + '.join(map(str, blocks))} = {sum(blocks)} layers, but "
            f"{draft.show(LAYERS)}. Change one of the numbers"
        )
    elif 0 in blocks[:-1]:
        yield f"{draft.show(CUTS)}: all stages but the last, which holds the head, need a layer"


def check_world(draft: Draft) -> Iterator[str]:
    """The world holds whole replicas of the model."""
    world, size = draft.get(WORLD), model_parallel_size(draft)
    if world % size:
        yield (
            f"{draft.name(WORLD)}={world} ({draft.sources[WORLD]}) is not a multiple of "
            f"{draft.show(TP)} x {draft.show(PP)} x {draft.show(SP)} = {size}: {world} / {size} "
            f"leaves {world % size}. Set WORLD_SIZE={-(-world // size) * size} or a smaller TP, PP "
            "or SP"
        )
    if HOSTS in draft.given and draft.get(HOSTS) > world:
        yield (
            f"{draft.show(HOSTS)}, but {draft.name(WORLD)}={world} ({draft.sources[WORLD]}) leaves "
            f"{draft.get(HOSTS) - world} of them without a rank. Set NGPU_PER_HOST, WORLD_SIZE or "
            f"{draft.name(HOSTS)}={world}"
        )


def check_zero(draft: Draft) -> Iterator[str]:
    """Options that only some ZeRO stages support."""
    zero, hpz = draft.get(ZERO), "parallel.zero_hpz_partition_size"
    size = draft.get(hpz)
    if size > 1 and zero != 3:
        yield (
            f"{draft.show(hpz)} is a secondary partition of ZeRO-3's parameters, but "
            f"{draft.show(ZERO)}. Set {draft.name(ZERO)}=3 or unset {draft.name(hpz)}"
        )
    zero_ranks = draft.get(WORLD) // (draft.get(TP) * draft.get(PP))
    if size > 1 and zero_ranks % size:
        yield _uneven_shards(draft, hpz, zero_ranks)
    yield from _check_mics(draft, zero_ranks)


def _uneven_shards(draft: Draft, key: str, zero_ranks: int) -> str:
    """Why the ranks that ZeRO shards over do not make groups of the option's size."""
    size = draft.get(key)
    ranks = "DP" if draft.get(SP) == 1 else "DP x SP"
    return (
        f"{draft.show(key)} does not divide {ranks}={zero_ranks}: {zero_ranks} / {size} leaves "
        f"{zero_ranks % size}. Set it to the number of ranks per host"
    )


def _check_mics(draft: Draft, zero_ranks: int) -> Iterator[str]:
    """MiCS is ZeRO-3 within equal groups of the ranks that ZeRO shards over."""
    key, size = "parallel.mics_shard_size", draft.get("parallel.mics_shard_size")
    if size == 0:
        return
    if draft.get(ZERO) != 3:
        yield (
            f"{draft.show(key)} shards as ZeRO-3 does, but {draft.show(ZERO)}. Set "
            f"{draft.name(ZERO)}=3 or unset {draft.name(key)}"
        )
    if size == 1:
        yield (
            f"{draft.show(key)} shards nothing. Unset it and {draft.name(ZERO)}, or set "
            f"{draft.name(key)}=2 or more"
        )
    if zero_ranks % size:
        yield _uneven_shards(draft, key, zero_ranks)
    hpz, host = "parallel.zero_hpz_partition_size", "parallel.cpu_optimizer"
    if draft.get(hpz) > 1:
        yield (
            f"{draft.show(key)} and {draft.show(hpz)} both keep parameters within a host: unset one"
        )
    if draft.get(host):
        yield (
            f"{draft.show(key)} averages gradients on the device, but {draft.name(host)} "
            "moves them to the host before that. Unset one of them"
        )


def check_reduction(draft: Draft) -> Iterator[str]:
    """Only bf16 gradients have a choice."""
    key, dtype = "train.grad_reduce_in_bf16", "train.dtype"
    if draft.get(key) and draft.get(dtype) != "bf16":
        yield (
            f"{draft.name(key)} is an option for bf16 gradients, but {draft.show(dtype)}. Unset "
            f"{draft.name(key)}, or set {draft.name(dtype)}=bf16"
        )


def check_optimizer(draft: Draft) -> Iterator[str]:
    """A known optimizer that works with the layout."""
    key = "optimizer.optimizer"
    rule, name = draft.get(key), draft.name(key)
    problem = optimizers.problem(rule, name)
    if problem:
        yield problem
        return
    if optimizers.RULES[rule].whole_matrix and draft.get(ZERO) > 1:
        yield (
            f"{draft.show(key)} needs whole matrices, which {draft.show(ZERO)} "
            f"partitions. Set {draft.name(ZERO)}=1 or {name}=adamw"
        )
    if rule == "adamwschedulefree" and draft.get(ZERO) == 3:
        yield (
            f"{draft.show(key)} counts steps and swaps weights per parameter group, which "
            f"{draft.show(ZERO)} partitions. Set {draft.name(ZERO)}=2 or {name}=adamw"
        )
    on_host = [name for name, known in optimizers.RULES.items() if known.on_the_host]
    if draft.get("parallel.cpu_optimizer") and rule not in on_host:
        yield (
            f"{draft.show(key)} does not run on the host: {draft.name('parallel.cpu_optimizer')} "
            f"supports {', '.join(on_host)}. Set {name}=adamw or unset "
            f"{draft.name('parallel.cpu_optimizer')}"
        )


def check_learning_rate(draft: Draft) -> Iterator[str]:
    """Rates in order, and phases that fit into the decay steps."""
    peak, low = "optimizer.learning_rate", "optimizer.min_learning_rate"
    if draft.get(low) > draft.get(peak):
        yield f"{draft.show(low)} is above {draft.show(peak)}. Lower {draft.name(low)}"
    style, warmup = draft.get("optimizer.lr_decay_style"), "optimizer.lr_warmup_fraction"
    phases = [warmup]
    if style.startswith("infinite-"):
        phases += ["optimizer.lr_cooldown_fraction", "optimizer.lr_constant_fraction"]
        constant = "optimizer.lr_constant"
        if not draft.get(low) <= draft.get(constant) <= draft.get(peak):
            yield (
                f"{draft.show(constant)} is not between {draft.show(low)} and {draft.show(peak)}, "
                f"as {draft.show('optimizer.lr_decay_style')} needs. Set "
                f"{draft.name(constant)}={draft.get(peak) / 2:g}"
            )
    elif style == "warmup-stable-decay":
        phases.append("optimizer.lr_decay_fraction")
    share = sum(draft.get(phase) for phase in phases)
    if share > 1 + 1e-9:  # 0.1 + 0.2 + 0.7 is not above 1
        yield (
            f"{' + '.join(draft.show(phase) for phase in phases)} = {share:g} is more than the "
            "whole run (1). Lower one of them"
        )


def check_evaluation(draft: Draft) -> Iterator[str]:
    """Evaluation has data to evaluate on."""
    interval, share = "log.eval_interval", "data.valid_split"
    if draft.get(interval) > 0 and draft.get(share) == 0:
        yield (
            f"{draft.show(share)} leaves no data for the evaluation every {draft.show(interval)} "
            f"steps. Set {draft.name(interval)}=0 or {draft.name(share)} above 0"
        )


def check_data_order(draft: Draft) -> Iterator[str]:
    """Options that only one sample order supports."""
    order, seed = "data.order", "train.seed"
    if draft.get(order) == "megatron":
        if draft.get(seed) >= 2**32:
            yield (
                f"{draft.show(seed)} is above 2^32 - 1, the largest seed of numpy's RandomState, "
                f"which {draft.show(order)} draws with. Set a smaller {draft.name(seed)}"
            )
        return
    epochs, shuffle = "data.train_data_exact_num_epochs", "data.shuffle_sample_in_corpus"
    for key, usual in ((epochs, None), (shuffle, True)):
        if draft.get(key) != usual:
            yield (
                f"{draft.show(key)} has no effect with {draft.show(order)}. Unset it, or set "
                f"{draft.name(order)}=megatron"
            )


def check_folders(draft: Draft) -> Iterator[str]:
    """What the run writes can be written."""
    run_dir, run_name = "checkpoint.run_dir", "checkpoint.run_name"
    name = draft.get(run_name)
    if "/" in name or name in (".", ".."):
        yield f"{draft.show(run_name)} is a name under runs/, not a path. Use RUN_DIR for a path"
    run = draft.get(run_dir)
    yield from _unwritable(
        Path(run or Path("runs") / name), draft.name(run_dir if run else run_name)
    )
    for key in ("checkpoint.save", "data.cache_path"):
        if draft.get(key):
            yield from _unwritable(Path(draft.get(key)), draft.name(key))


def _unwritable(folder: Path, name: str) -> Iterator[str]:
    """Why `folder` cannot be made or written to."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"{name}: {folder} cannot be made: {existing} is a file. Give another folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"{name}: {folder} cannot be written: no right to {existing}. Give another folder"


Check = Callable[[Draft], Iterator[str]]
# Before the batch arithmetic, which divides by the model-parallel size.
LAYOUT_CHECKS: tuple[Check, ...] = (
    check_shape,
    check_tensor_parallel,
    check_sequence_parallel,
    check_pipeline,
    check_world,
    check_zero,
    check_reduction,
    check_optimizer,
)
# Once every value is there.
FINAL_CHECKS: tuple[Check, ...] = (
    check_accumulation,
    check_learning_rate,
    check_evaluation,
    check_data_order,
    check_folders,
)


def require(draft: Draft, checks: tuple[Check, ...]) -> None:
    """Raise ConfigError with every message of the checks, if there is one."""
    problems = [problem for check in checks for problem in check(draft)]
    if problems:
        raise ConfigError("\n".join(problems))

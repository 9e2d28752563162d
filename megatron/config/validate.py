"""Checks of a configuration; messages give the user's variable, the arithmetic and a fix.

Checks are generators of messages, so that a user sees everything that is wrong at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron.config import engine_choice, profile, rope_scaling, update_rules
from megatron.config.errors import ConfigError
from megatron.config.option import Draft, Setting
from megatron.config.pipeline_stages import num_stages_per_rank, parse_cuts
from megatron.model.registry import ARCHITECTURES

TP, PP, SP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.sequence_parallel"
ZERO, WORLD = "parallel.zero_stage", "parallel.world_size"
HPZ, MICS = "parallel.zero_hpz_partition_size", "parallel.mics_shard_size"
SCHEDULE, CUTS = "parallel.pipeline_schedule", "parallel.pipeline_cuts"
HEADS, KV_HEADS = "model.num_attention_heads", "model.num_key_value_heads"
ARCHITECTURE, HEAD_DIM = "model.architecture", "model.head_dim"
HIDDEN, FFN, LAYERS = "model.hidden_size", "model.ffn_hidden_size", "model.num_layers"
CPU_OPTIMIZER = "parallel.cpu_optimizer"


def model_parallel_size(draft: Draft) -> int:
    """Ranks that hold one replica of the model: TP x PP x SP."""
    return math.prod(draft.get(key) for key in (TP, PP, SP))


def divides(draft: Draft, part: str, *wholes: str, unit: int = 1) -> Iterator[str]:
    """The option `part` must divide every option of `wholes`, best into multiples of `unit`."""
    divisor = draft[part]
    common = math.gcd(*(draft.get(whole) for whole in wholes))
    fitting = next(d for d in range(divisor.value, 0, -1) if common % (d * unit) == 0 or d == 1)
    for whole in (draft[key] for key in wholes):
        if whole.value % divisor.value:
            yield (
                f"{divisor} does not divide {whole}: {whole.value} / {divisor.value} leaves "
                f"{whole.value % divisor.value}. Set {divisor.name}={fitting}, or "
                f"{whole.name}={_multiple(whole.value, unit * divisor.value)}"
            )


def _multiple(number: int, of: int) -> int:
    """The smallest multiple of `of` that is not below `number`."""
    return -(-number // of) * of


def check_shape(draft: Draft) -> Iterator[str]:
    """HEADS divides HIDDEN unless HEAD_DIM is set; key/value heads divide the query heads."""
    width, rest = draft.get(HEAD_DIM), 0
    if width is None:
        yield from divides(draft, HEADS, HIDDEN, unit=2)  # rotary embeddings rotate pairs
        width, rest = divmod(draft.get(HIDDEN), draft.get(HEADS))
    yield from divides(draft, KV_HEADS, HEADS)
    hidden, heads, head_dim = draft[HIDDEN], draft[HEADS], draft[HEAD_DIM]
    scaling, architecture = draft["model.rope_scaling"], draft[ARCHITECTURE]
    family = ARCHITECTURES[architecture.value]
    if family.learned_positions:
        yield from _check_plain_heads(draft)
    elif head_dim.value is not None and head_dim.value % 2:
        yield (
            f"{head_dim} is odd, but rotary embeddings rotate pairs: set "
            f"{head_dim.name}={head_dim.value + 1}"
        )
    elif width % 2 and rest == 0:
        yield (
            f"{hidden} / {heads} = {width} is odd, but rotary embeddings rotate pairs: set "
            f"{hidden.name}={heads.value * (width + 1)}"
        )
    for field, value in family.fixed.items():
        fixed = draft[f"model.{field}"]
        if fixed.value != value:
            yield (
                f"{fixed}, but {architecture} has {value} only: set {fixed.name}={value}, or "
                f"another {architecture.name}"
            )
    if scaling.value is not None:
        try:
            rope_scaling.parse(scaling.value, scaling.name)
        except ConfigError as error:
            yield str(error)


def _check_plain_heads(draft: Draft) -> Iterator[str]:
    """Heads as GPT-2 has them: keys and values for each, which together are as wide as HIDDEN."""
    architecture, heads, keys = draft[ARCHITECTURE], draft[HEADS], draft[KV_HEADS]
    width = draft[HEAD_DIM]
    if keys.value != heads.value:
        yield (
            f"{keys}, but {architecture} has keys and values for each of {heads}: set "
            f"{keys.name}={heads.value}"
        )
    if width.value is not None and width.value * heads.value != draft.get(HIDDEN):
        yield f"{width}, but {architecture} has {draft[HIDDEN]} / {heads} only: unset {width.name}"


def check_tensor_parallel(draft: Draft) -> Iterator[str]:
    """Every matrix is sharded evenly."""
    yield from divides(draft, TP, HEADS, KV_HEADS, HIDDEN, FFN)


def check_sequence_parallel(draft: Draft) -> Iterator[str]:
    """Both kinds of sequence parallelism divide the sequence evenly, Ulysses the heads too."""
    tp, sp, heads, length = draft[TP], draft[SP], draft[HEADS], draft["model.seq_length"]
    ranks = tp.value * sp.value
    if sp.value > 1 and heads.value % tp.value == 0 and heads.value % ranks:
        own = heads.value // tp.value
        fitting = next(size for size in range(sp.value, 0, -1) if own % size == 0)
        yield (
            f"{tp} x {sp} does not divide {heads}: {heads.value} / {ranks} leaves "
            f"{heads.value % ranks}. Each rank computes the attention of some heads: set "
            f"{sp.name}={fitting}, or {heads.name}={_multiple(heads.value, ranks)}"
        )
    names, why, megatron = f"{sp} x {tp}", "", draft["parallel.megatron_sequence_parallel"]
    if megatron.value and tp.value > 1:
        why = f" ({megatron.name} also shards it over the TP ranks)"
    else:
        names, ranks = str(sp), sp.value
    if length.value % ranks:
        yield (
            f"{names} does not divide {length}: {length.value} / {ranks} leaves "
            f"{length.value % ranks}{why}. Set {length.name}={_multiple(length.value, ranks)}"
        )


def check_pipeline(draft: Draft) -> Iterator[str]:
    """At least one layer per stage, and a ZeRO stage that the pipeline engine supports."""
    stages, layers, zero = draft[PP], draft[LAYERS], draft[ZERO]
    if layers.value < stages.value:
        yield (
            f"{stages} stages need at least one layer each, but {layers}: {layers.value} < "
            f"{stages.value}. Set {stages.name}={layers.value} or less, or "
            f"{layers.name}={stages.value} or more"
        )
    if stages.value > 1 and zero.value > 1:
        yield (
            f"{zero} does not work with {stages}: ZeRO 2 and 3 shard gradients after every "
            "micro-batch, a pipeline accumulates them over the step. Set "
            f"{zero.name}=1, or {stages.name}=1"
        )
    yield from _check_schedule(draft[SCHEDULE], stages, layers)
    yield from _check_cuts(draft)
    kept, each = draft["train.checkpoint_num_layers"], layers.value // stages.value
    if draft.get("train.activation_checkpointing") == "1" and kept.value > max(1, each):
        yield f"{kept} is more than the layers of a pipeline stage: {layers} / {stages} = {each}"


def _check_schedule(schedule: Setting, stages: Setting, layers: Setting) -> Iterator[str]:
    """DualPipeV has two stages per rank."""
    if num_stages_per_rank(schedule.value) == 1:
        return
    if stages.value == 1:
        yield (
            f"{schedule} is a pipeline schedule, but {stages}. Set {stages.name}=2 or more, or "
            f"unset {schedule.name}"
        )
    if layers.value < 2 * stages.value:
        yield (
            f"{schedule} splits the model into 2 x {stages} = {2 * stages.value} stages, but "
            f"{layers}. Set {stages.name}={max(1, layers.value // 2)} or less"
        )


def check_accumulation(draft: Draft) -> Iterator[str]:
    """DualPipeV fills its two directions with micro-batches."""
    stages, steps = draft[PP], draft["train.gradient_accumulation_steps"]
    schedule, least = draft[SCHEDULE], 2 * stages.value
    if num_stages_per_rank(schedule.value) == 2 and steps.value < least:
        yield (
            f"{schedule} needs 2 x {stages} = {least} micro-batches per step, but {steps}. Set "
            f"{steps.name}={least} or more, or unset {schedule.name}"
        )


def _check_cuts(draft: Draft) -> Iterator[str]:
    """The layers per stage add up to the model."""
    cuts, layers = draft[CUTS], draft[LAYERS]
    if not cuts.value:
        return
    try:
        blocks = parse_cuts(cuts.value, cuts.name)
    except ConfigError as error:
        yield str(error)
        return
    each = num_stages_per_rank(draft.get(SCHEDULE))
    stages = draft.get(PP) * each
    if len(blocks) != stages:
        doubled = " x 2 (dualpipev)" if each == 2 else ""
        yield (
            f"{cuts} names {len(blocks)} stages, but {draft[PP]}{doubled} = {stages}. Give "
            f"{stages} numbers"
        )
    elif sum(blocks) != layers.value:
        total = f"{' + '.join(map(str, blocks))} = {sum(blocks)}"
        yield f"{cuts} has {total} layers, but {layers}. Change one of the numbers"
    elif 0 in blocks[:-1]:
        yield f"{cuts}: all stages but the last, which holds the head, need a layer"


def check_world(draft: Draft) -> Iterator[str]:
    """The world holds whole replicas of the model."""
    world, size, hosts = draft[WORLD], model_parallel_size(draft), draft["launch.num_hosts"]
    source = f"{world} ({draft.sources[WORLD]})"
    if world.value % size:
        yield (
            f"{source} is not a multiple of {draft[TP]} x {draft[PP]} x {draft[SP]} = {size}: "
            f"{world.value} / {size} leaves {world.value % size}. Set "
            f"WORLD_SIZE={_multiple(world.value, size)} or a smaller TP, PP or SP"
        )
    if "launch.num_hosts" in draft.given and hosts.value > world.value:
        yield (
            f"{hosts}, but {source} leaves {hosts.value - world.value} of them without a rank. Set "
            f"NGPU_PER_HOST, WORLD_SIZE or {hosts.name}={world.value}"
        )


def check_zero(draft: Draft) -> Iterator[str]:
    """Options that only some ZeRO stages support: hpZ, and MiCS, which is ZeRO-3 in groups."""
    zero, hpz, mics, host = (draft[key] for key in (ZERO, HPZ, MICS, CPU_OPTIMIZER))
    ranks = draft.get(WORLD) // (draft.get(TP) * draft.get(PP))
    axes = "DP" if draft.get(SP) == 1 else "DP x SP"
    if hpz.value > 1 and zero.value != 3:
        yield (
            f"{hpz} is a secondary partition of ZeRO-3's parameters, but {zero}. Set "
            f"{zero.name}=3 or unset {hpz.name}"
        )
    if mics.value and zero.value != 3:
        yield (f"{mics} shards as ZeRO-3 does, but {zero}. Set {zero.name}=3 or unset {mics.name}")
    for group in (hpz, mics):
        if group.value > 1 and ranks % group.value:
            yield (
                f"{group} does not divide {axes}={ranks}: {ranks} / {group.value} leaves "
                f"{ranks % group.value}. Set it to the number of ranks per host"
            )
    if mics.value == 1:
        yield (f"{mics} shards nothing. Unset it and {zero.name}, or set {mics.name}=2 or more")
    if mics.value and hpz.value > 1:
        yield f"{mics} and {hpz} both keep parameters within a host: unset one"
    if mics.value and host.value:
        yield (
            f"{mics} averages gradients on the device, but {host.name} moves them to the host "
            "before that. Unset one of them"
        )


def check_engine(draft: Draft) -> Iterator[str]:
    """The sharded engine, where it is asked for, can do the rest."""
    engine = draft["parallel.engine"]
    met = engine_choice.limit({one.key: draft.get(one.key) for one in engine_choice.LIMITS})
    if engine.value == "sharded" and met:
        other = draft[met.key]
        value = int(other.value) if isinstance(other.value, bool) else other.value
        yield (
            f"{engine} does not run with {other.name}={value}: {met.why}. Unset {engine.name}: "
            "DeepSpeed then takes the steps"
        )


def check_reduction(draft: Draft) -> Iterator[str]:
    """Only bf16 gradients have a choice of precision."""
    reduction, dtype = draft["train.grad_reduce_in_bf16"], draft["train.dtype"]
    if reduction.value and dtype.value != "bf16":
        yield (
            f"{reduction.name} is an option for bf16 gradients, but {dtype}. Unset "
            f"{reduction.name}, or set {dtype.name}=bf16"
        )


def check_float8(draft: Draft) -> Iterator[str]:
    """fp8 products are of bf16 matrices, whose sides are multiples of 16 on each rank."""
    float8, dtype, zero = draft["train.float8"], draft["train.dtype"], draft[ZERO]
    if float8.value == "0":
        return
    if dtype.value != "bf16":
        yield f"{float8} scales bf16 matrices, but {dtype}. Set {dtype.name}=bf16"
    if zero.value == 3:
        yield (
            f"{float8} keeps the gathered weights of all layers until the backward pass, which "
            f"{zero} is to avoid. Set {zero.name}=2"
        )
    tp, sp, heads = draft[TP], draft[SP], draft[HEADS]
    width = draft.get(HEAD_DIM) or draft.get(HIDDEN) // heads.value
    micro, length = draft["train.micro_batch_size"], draft["model.seq_length"]
    hidden, key_heads, ffn = draft[HIDDEN], draft[KV_HEADS], draft[FFN]
    for words, size in (
        (str(hidden), hidden.value),
        (f"{heads} x head width {width} / {tp}", heads.value * width // tp.value),
        (f"{key_heads} x head width {width} / {tp}", key_heads.value * width // tp.value),
        (f"{ffn} / {tp}", ffn.value // tp.value),
        (f"{micro} x {length} / {sp}", micro.value * length.value // sp.value),
    ):
        if size % 16:
            yield (
                f"{float8} multiplies matrices whose sides are multiples of 16, but {words} = "
                f"{size}. Change it to a multiple, or unset {float8.name}"
            )


def check_optimizer(draft: Draft) -> Iterator[str]:
    """A known optimizer that works with the layout."""
    rule, zero, host = draft["optimizer.optimizer"], draft[ZERO], draft[CPU_OPTIMIZER]
    problem = update_rules.problem(rule.value, rule.name)
    if problem:
        yield problem
        return
    if update_rules.RULES[rule.value].whole_matrix and zero.value > 1:
        yield (
            f"{rule} needs whole matrices, which {zero} partitions. "
            f"Set {zero.name}=1 or {rule.name}=adamw"
        )
    if rule.value == "adamwschedulefree" and zero.value == 3:
        yield (
            f"{rule} counts steps and swaps weights per parameter group, which {zero} partitions. "
            f"Set {zero.name}=2 or {rule.name}=adamw"
        )
    on_host = [name for name, known in update_rules.RULES.items() if known.on_the_host]
    if host.value and rule.value not in on_host:
        yield (
            f"{rule} does not run on the host: {host.name} supports "
            f"{', '.join(on_host)}. Set {rule.name}=adamw or unset {host.name}"
        )


def check_learning_rate(draft: Draft) -> Iterator[str]:
    """Rates in order, and phases that fit into the decay steps."""
    peak, low = draft["optimizer.learning_rate"], draft["optimizer.min_learning_rate"]
    constant, style = draft["optimizer.lr_constant"], draft["optimizer.lr_decay_style"]
    if low.value > peak.value:
        yield f"{low} is above {peak}. Lower {low.name}"
    names = ["warmup"]
    if style.value.startswith("infinite-"):
        names += ["cooldown", "constant"]
        if not low.value <= constant.value <= peak.value:
            yield (
                f"{constant} is not between {low} and {peak}, as {style} needs. Set "
                f"{constant.name}={peak.value / 2:g}"
            )
    elif style.value == "warmup-stable-decay":
        names.append("decay")
    phases = [draft[f"optimizer.lr_{name}_fraction"] for name in names]
    total = sum(phase.value for phase in phases)
    if total > 1 + 1e-9:  # 0.1 + 0.2 + 0.7 is not above 1
        yield (
            f"{' + '.join(map(str, phases))} = {total:g} is more than the whole run (1). "
            "Lower one of them"
        )


def check_lr_finder(draft: Draft) -> Iterator[str]:
    """A search begins with a run of its own."""
    finder, resumed = draft["optimizer.lr_finder"], draft["checkpoint.resume"]
    if finder.value and draft.sources.get("checkpoint.resume") == "is in the other options":
        yield f"{finder.name} searches from step 1 and saves nothing: unset {resumed.name}"
    lowest, highest = draft["optimizer.min_learning_rate"], draft["optimizer.learning_rate"]
    if finder.value and lowest.value >= highest.value:
        yield f"{finder.name} rises from {lowest} to {highest}. Raise {highest.name}"


def check_weight_decay(draft: Draft) -> Iterator[str]:
    """A schedule of the weight decay has both ends; without one there are none."""
    style = draft["optimizer.weight_decay_incr_style"]
    ends = [draft[f"optimizer.{end}_weight_decay"] for end in ("start", "end")]
    missing = [end for end in ends if end.value is None]
    if style.value != "constant" and missing:
        names = " and ".join(end.name for end in missing)
        are, them = ("is", "it") if len(missing) == 1 else ("are", "both")
        yield (
            f"{style} goes from START_WEIGHT_DECAY to END_WEIGHT_DECAY, but {names} {are} not set. "
            f"Set {them}, e.g. {missing[0].name}={draft.get('optimizer.weight_decay')}"
        )
    for end in ends:
        if style.value == "constant" and end.value is not None:
            yield (
                f"{end} has no effect with {style}. Unset it and set WEIGHT_DECAY, or set "
                f"{style.name}=linear"
            )


def check_evaluation(draft: Draft) -> Iterator[str]:
    """Evaluation has data to evaluate on."""
    interval, share = draft["log.eval_interval"], draft["data.valid_split"]
    if interval.value > 0 and share.value == 0:
        yield (
            f"{share} leaves no data for the evaluation every {interval} steps. Set "
            f"{interval.name}=0 or {share.name} above 0"
        )


def check_data_order(draft: Draft) -> Iterator[str]:
    """Options that only one sample order supports."""
    order, seed = draft["data.order"], draft["train.seed"]
    epochs, shuffle = (
        draft["data.train_data_exact_num_epochs"],
        draft["data.shuffle_sample_in_corpus"],
    )
    if order.value == "megatron":
        if seed.value >= 2**32:
            yield (
                f"{seed} is above 2^32 - 1, the largest seed of numpy's RandomState, which {order} "
                f"draws with. Set a smaller {seed.name}"
            )
        return
    for setting, usual in ((epochs, None), (shuffle, True)):
        if setting.value != usual:
            yield f"{setting} has no effect with {order}. Unset it, or set {order.name}=megatron"


def check_documents(draft: Draft) -> Iterator[str]:
    """The one optimizer that counts the tokens of a step itself counts all of them."""
    masked, rule = draft["data.eod_mask_loss"], draft["optimizer.optimizer"]
    if masked.value and rule.value == "sophiag":
        yield (
            f"{rule} estimates its Hessian from all tokens of a step, but {masked.name} leaves "
            f"some out. Unset {masked.name}, or set {rule.name}=adamw"
        )


def check_retention(draft: Draft) -> Iterator[str]:
    """Exceptions to a removal need the removal."""
    last = draft["checkpoint.keep_last"]
    for name in ("keep_every", "keep_best"):
        kept = draft[f"checkpoint.{name}"]
        if kept.value is not None and last.value is None:
            yield (
                f"{kept} keeps checkpoints that {last.name} would remove, but without {last.name} "
                f"all are kept. Set {last.name}, e.g. {last.name}=3, or unset {kept.name}"
            )


def check_folders(draft: Draft) -> Iterator[str]:
    """What the run writes can be written."""
    run_dir, run_name = draft["checkpoint.run_dir"], draft["checkpoint.run_name"]
    if "/" in run_name.value or run_name.value in (".", ".."):
        yield f"{run_name} is a name under runs/, not a path. Use RUN_DIR for a path"
    run = Path(run_dir.value or Path("runs") / run_name.value)
    yield from _unwritable(run, run_dir.name if run_dir.value else run_name.name)
    for folder in (
        draft["checkpoint.save"], draft["data.cache_path"], draft["log.tensorboard_dir"]
    ):  # fmt: skip
        if folder.value:
            yield from _unwritable(Path(folder.value), folder.name)


def check_beginning(draft: Draft) -> Iterator[str]:
    """A run that begins with the weights of another one has them, and saves elsewhere."""
    finetune, load = draft["checkpoint.finetune"], draft["checkpoint.load"]
    if not finetune.value:
        return
    if not load.value:
        yield (
            f"{finetune.name}=1 begins with the weights of {load.name}, which is not set. Set "
            f"{load.name} to a folder of checkpoints (runs/NAME/checkpoints) or of a Hugging Face "
            "model"
        )
        return
    run_dir, run_name, save = (
        draft[f"checkpoint.{key}"] for key in ("run_dir", "run_name", "save")
    )
    run = Path(run_dir.value or Path("runs") / run_name.value)
    own = Path(save.value) if save.value else run / "checkpoints"
    if Path(load.value).resolve() == own.resolve():
        chosen = next((one.name for one in (save, run_dir) if one.value), run_name.name)
        yield (
            f"{finetune.name}=1 begins a new run, but {load} is the folder that this run saves "
            f"to. Set another {chosen}"
        )


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
    check_optimizer,
)


# Once every value is set.
def check_profile(draft: Draft) -> Iterator[str]:
    """The run has the steps and the ranks that are to be profiled."""
    if draft.get("log.profile") == "off":
        return
    given = draft.get("log.profile"), draft.get("log.profile_steps"), draft.get("train.train_iters")
    try:
        profile.steps(*given)
        profile.ranks(draft.get("log.profile_ranks"), draft.get(WORLD))
    except ConfigError as error:
        yield str(error)


FINAL_CHECKS: tuple[Check, ...] = (
    check_profile,
    check_engine,
    check_reduction,
    check_float8,
    check_accumulation,
    check_learning_rate,
    check_lr_finder,
    check_weight_decay,
    check_evaluation,
    check_data_order,
    check_documents,
    check_retention,
    check_folders,
    check_beginning,
)


def require(draft: Draft, checks: tuple[Check, ...]) -> None:
    """Raise ConfigError with every message of the checks, if there is one."""
    problems = [problem for check in checks for problem in check(draft)]
    if problems:
        raise ConfigError("\n".join(problems))

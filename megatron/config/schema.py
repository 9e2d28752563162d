"""The configuration: frozen sections, one field a line with its variables, flags, default and help.

A field is the only place an option is named: `--help`, the README's table, parsing and run.json come from it.
`None` stands for "not set": resolve.py fills every such field from preset, machine or arithmetic, or leaves it off.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import presets, skip
from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.config.option import Option, option
from megatron.config.pipeline_stages import balanced_blocks, num_stages_per_rank, parse_cuts
from megatron.config.shape import ModelShape
from megatron.model.architecture import Architecture
from megatron.model.registry import ARCHITECTURES

LR_DECAY_STYLES = (
    "constant", "linear", "cosine", "inverse-square-root",
    "infinite-cosine", "infinite-inv-square-root", "warmup-stable-decay",
)  # fmt: skip
TOKENIZER_TYPES = (
    "HFTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "Llama2Tokenizer",
    "ByteTokenizer", "CharTokenizer", "NullTokenizer", "BuiltinTokenizer",
)  # fmt: skip


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are cut over ranks."""

    tensor_parallel: int = option(None, "TP", "--tensor-model-parallel-size --tp", "ranks that share each matrix; default 1 (2 on Perlmutter, as in the reference)", least=1)
    pipeline_parallel: int = option(1, "PP", "--pipeline-model-parallel-size --pp", "pipeline stages", least=1)
    pipeline_schedule: str = option("1f1b", "PIPELINE_SCHEDULE", "--pipeline-schedule", "order of a pipeline's passes: 1f1b, or dualpipev (two stages a rank, GRAD_ACC_STEPS of 2 PP or more)", ("1f1b", "dualpipev"))
    pipeline_cuts: str | None = option(None, "PIPELINE_CUTS", "--pipeline-cuts", "layers of each pipeline stage, such as `5,6,6,5`; default: balanced by cost, head included")
    sequence_parallel: int = option(1, "SP", "--ds-sequence-parallel-size --sp", "ranks that share each sample, a piece of the sequence each (Ulysses)", least=1)
    megatron_sequence_parallel: bool = option(False, "SEQUENCE_PARALLEL", "--sequence-parallel", "cut norms and residual stream along the sequence over the TP ranks (Megatron)")
    zero_stage: int = option(1, "ZERO_STAGE", "--zero-stage", "what the data-parallel ranks share out: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights", most=3)
    zero_hpz_partition_size: int = option(1, "ZERO_HPZ_PARTITION_SIZE", "--zero-hpz-partition-size", "ZeRO-3: ranks of the secondary partition (ranks of a node); 1: off", least=1)
    mics_shard_size: int = option(0, "MICS_SHARD_SIZE", "--mics-shard-size", "ZeRO-3 shards inside groups of this many ranks; 0: off")
    cpu_optimizer: bool = option(False, "CPU_OPTIMIZER", "--cpu-optimizer", "optimizer states and step on the host")
    world_size: int = option(None, "WORLD_SIZE", "--world-size", "ranks in all; default: from the scheduler, or TP x PP x SP without an accelerator", least=1)


@dataclass(frozen=True)
class TrainConfig:
    """Batch, length, precision and memory."""

    micro_batch_size: int = option(None, "MICRO_BATCH", "--micro-batch-size", "samples of one forward pass of one data-parallel rank; default from the machine table", least=1)
    gradient_accumulation_steps: int = option(None, "GRAD_ACC_STEPS GAS", "--gradient-accumulation-steps", "micro-batches of a step; default from the machine table", least=1)
    global_batch_size: int = option(None, "GLOBAL_BATCH", "--global-batch-size", "samples of a step = MICRO_BATCH x GRAD_ACC_STEPS x DP", least=1)
    train_iters: int = option(None, "TRAIN_ITERS TRAIN_ITER", "--train-iters", "steps of the run", least=1)
    train_tokens: int = option(None, "TRAIN_TOKENS", "--train-tokens", "tokens of the run, another way to give TRAIN_ITERS", least=1)
    seed: int = option(1234, "SEED", "--seed", "seed of the initial weights and of the sample order")
    dtype: str = option(None, "DTYPE", "--dtype", "precision of weights and activations; default bf16 (Polaris: fp16)", ("bf16", "fp16", "fp32"))
    grad_reduce_in_bf16: bool = option(False, "GRAD_REDUCE_IN_BF16", "--grad-reduce-in-bf16", "DTYPE=bf16: average gradients over the ranks in bf16, half of the bytes; 0: in fp32")
    activation_checkpointing: str = option("0", "USE_ACTIVATION_CHECKPOINTING", "--recompute-granularity", "recompute activations in the backward pass: 0 none, 1 whole layers, selective", ("0", "1", "selective"))
    checkpoint_num_layers: int = option(1, "ACT_CKPT_NUM_LAYERS", "--checkpoint-num-layers --recompute-num-layers", "layers between two kept activations", least=1)
    compile: str = option("auto", "COMPILE", "--compile", "torch.compile of each layer: 0, 1, auto (on accelerators)", ("auto", "0", "1"))
    no_flash_attention: bool = option(False, "NO_FLASH_ATTN", "--no-flash-attn", "use the plain attention kernel")


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rule and learning rate."""

    optimizer: str = option("adamw", "OPT OPTIMIZER OPTIM", "--optimizer", "update rule; see docs for the list")
    learning_rate: float = option(2e-4, "LR", "--lr", "highest learning rate", above=0)
    min_learning_rate: float = option(0.0, "MIN_LR", "--min-lr", "lowest learning rate after decay")
    lr_decay_style: str = option("cosine", "LR_DECAY_STYLE", "--lr-decay-style", "shape of the learning rate", LR_DECAY_STYLES)
    lr_warmup_fraction: float = option(0.05, "LR_WARMUP_FRAC LR_WARMUP_FRACTION", "--lr-warmup-fraction", "share of the decay steps spent warming up", below=1)
    lr_decay_iters: int = option(None, "LR_DECAY_ITERS", "--lr-decay-iters", "steps over which the rate decays; default TRAIN_ITERS", least=1)
    lr_cooldown_fraction: float = option(0.65, "LR_COOLDOWN_FRACTION", "--lr-cooldown-fraction", "infinite-*: share of the decay steps from LR down to LR_CONSTANT; warmup-stable-decay: use LR_DECAY_FRACTION", most=1)
    lr_constant: float = option(1.1e-4, "LR_CONSTANT", "--constant-lr", "infinite-*: rate of the constant phase")
    lr_constant_fraction: float = option(0.001, "LR_CONSTANT_FRACTION", "--lr-constant-fraction", "infinite-*: share of the decay steps at LR_CONSTANT", most=1)
    lr_timescale: float = option(10.0, "LR_TIMESCALE", "--timescale", "infinite-inv-square-root: time scale of the decay", above=0)
    lr_decay_fraction: float = option(0.1, "LR_DECAY_FRACTION", "--lr-decay-fraction", "warmup-stable-decay: share of the decay steps spent decaying, at the end", most=1)
    adam_beta1: float = option(0.9, "ADAM_BETA1", "--adam-beta1", "decay of the first moment", below=1)
    adam_beta2: float = option(0.95, "ADAM_BETA2", "--adam-beta2", "decay of the second moment", below=1)
    adam_eps: float = option(1e-5, "ADAM_EPS", "--adam-eps", "added to the root of the second moment", above=0)
    sgd_momentum: float = option(0.0, "SGD_MOMENTUM", "--sgd-momentum", "momentum of sgd", below=1)
    sophia_rho: float = option(0.05, "SOPHIA_RHO", "--sophiag-rho", "sophiag: larger clips fewer elements to the sign of the momentum", above=0)
    sophia_hessian_interval: int = option(10, "SOPHIA_HESSIAN_INTERVAL", "--sophiag-hessian-interval", "sophiag: steps between two estimates of the curvature", least=1)
    weight_decay: float = option(0.1, "WEIGHT_DECAY", "--weight-decay", "decoupled weight decay of matrices (norms are not decayed)")
    clip_grad: float = option(1.0, "CLIP_GRAD", "--clip-grad", "gradient norm is clipped to this; 0: never")


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, with which tokenizer."""

    data_file_list: str = option(None, "DATA_FILE_LIST", "--data-file-list", "file of `weight prefix corpus` lines, or `builtin`; default ALCF/data-lists/<machine>/dolma.txt, elsewhere builtin")
    order: str = option("stateless", "DATA_ORDER", "--data-order", "rule that gives step i its samples", ("stateless", "megatron"))
    blend_sample_in_corpus: bool = option(False, "BLEND_SAMPLE_IN_CORPUS", "--blend-sample-in-corpus", "DATA_ORDER=megatron: blend the files of a corpus; else they follow one another")
    shuffle_sample_in_corpus: bool = option(True, "SHUFFLE_SAMPLE_IN_CORPUS", "--shuffle-sample-in-corpus", "DATA_ORDER=megatron: shuffle the samples of each corpus; 0: not")
    train_data_exact_num_epochs: int | None = option(None, "TRAIN_DATA_EXACT_NUM_EPOCHS", "--train-data-exact-num-epochs", "DATA_ORDER=megatron: epochs of every training file; unset: as many as it needs", least=1)
    cache_path: str | None = option(None, "DATA_CACHE_PATH", "--data-cache-path", "DATA_ORDER=megatron: folder of the cached order; default data-cache beside the run's folder")
    train_split: float = option(990, "TRAIN_SPLIT", "--train-split", "share of each file used for training", above=0)
    valid_split: float = option(10, "VAL_SPLIT", "--val-split", "share of each file used for validation")
    test_split: float = option(0, "TEST_SPLIT", "--test-split", "share of each file used for testing")
    allow_data_change: bool = option(False, "ALLOW_DATA_CHANGE", "--allow-data-change", "resume with other data than the checkpoint's: a new stage begins where it stands")
    tokenizer_type: str = option(None, "TOKENIZER_TYPE", "--tokenizer-type", "kind of tokenizer; default HFTokenizer, for the built-in corpus its own", TOKENIZER_TYPES)
    tokenizer_model: str | None = option(None, "TOKENIZER_MODEL", "--tokenizer-model", "name or path of the tokenizer; default google/gemma-7b on HPC machines")
    train_range_to_skip: str | None = option(None, "TRAIN_RANGE_TO_SKIP", "--train-range-to-skip", "steps not to train on: `10 20 25 30`, `10-20,25-30` or `@file`; inclusive, as printed in the log")


@dataclass(frozen=True)
class CheckpointConfig:
    """The run's folder and what is saved into it."""

    run_name: str = option(None, "RUN_NAME", "--run-name", "name of the run and its folder runs/<name>; default <arch>-seq<SEQ>-<data list>")
    run_dir: str | None = option(None, "RUN_DIR", "--run-dir", "the run's folder itself")
    save: str | None = option(None, "CKPT_DIR SAVE", "--save", "folder of the checkpoints; default <run folder>/checkpoints")
    load: str | None = option(None, "LOAD", "--load", "folder to resume from; default where checkpoints are saved")
    save_interval: int = option(50, "SAVE_INTERVAL", "--save-interval", "steps between checkpoints; 0: only at the end")
    exit_on_missing_checkpoint: bool = option(False, "", "--exit-on-missing-checkpoint", "status 4 where LOAD holds no usable checkpoint")


@dataclass(frozen=True)
class LogConfig:
    """Evaluation, log lines, trackers and debugging."""

    log_interval: int = option(1, "LOG_INTERVAL", "--log-interval", "steps between log lines", least=1)
    eval_interval: int = option(100, "EVAL_INTERVAL", "--eval-interval", "steps between evaluations; 0: never")
    eval_iters: int = option(20, "EVAL_ITERS", "--eval-iters", "batches of an evaluation", least=1)
    wandb_project: str = option("AuroraGPT", "WANDB_PROJECT WB_PROJECT", "--wandb-project", "Weights & Biases project")
    wandb_mode: str | None = option(None, "WANDB_MODE", "--wandb-mode", "Weights & Biases mode; without a key: off, said once", ("online", "offline", "disabled"))
    wandb_disabled: bool = option(False, "WANDB_DISABLED", "--wandb-disabled", "no Weights & Biases")
    no_tensorboard: bool = option(False, "NO_TENSORBOARD", "--no-tensorboard", "no TensorBoard files")
    log_corpus_loss: bool = option(False, "LOG_CORPUS_LOSS", "--log-corpus-loss", "training loss of each corpus in log and metrics")
    dump_tokens: bool = option(False, "DUMP_TOKENS", "--dump-tokens", "print the tokens of the first ten steps")
    dump_skipped_iters: bool = option(False, "DUMP_SKIPPED_ITERS", "--dump-skipped-iters", "print the tokens of skipped steps (they are read for it)")
    log_level: str = option("INFO", "LOG_LEVEL", "--log-level", "lowest level printed", ("DEBUG", "INFO", "WARNING", "ERROR"))
    debug: bool = option(False, "DEBUG", "--debug", "shell tracing and DEBUG log level")
    dry_run: bool = option(False, "DRY_RUN", "--dry-run", "print the plan, start nothing")


@dataclass(frozen=True)
class LaunchConfig:
    """Where the ranks run."""

    hostfile: str | None = option(None, "HOSTFILE", "--hostfile", "file with a host a line; default the scheduler's")
    num_hosts: int = option(None, "NHOSTS", "--nhosts", "hosts to use; default: lines of the host file", least=1)
    devices_per_host: int = option(None, "NGPU_PER_HOST", "--ngpu-per-host", "ranks a host; default from the machine table")
    cpu_bind: str | None = option(None, "CPU_BIND", "--cpu-bind", "CPU binding given to mpiexec or srun; default from the machine table")
    launch_with: str | None = option(None, "LAUNCH_WITH", "--launch-with", "launcher; default from the machine table", ("mpiexec", "srun", "mpirun", "torchrun", "local", "deepspeed"))


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run: made once before launch, never changed, written to run.json."""

    model: ModelShape
    parallel: ParallelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    launch: LaunchConfig
    machine: str = "generic"

    def __post_init__(self) -> None:
        """Raise ConfigError where a field that must have a value has none."""
        for section in dataclasses.fields(self):
            value = getattr(self, section.name)
            if dataclasses.is_dataclass(value):
                for field in dataclasses.fields(value):
                    if "None" not in str(field.type) and getattr(value, field.name) is None:
                        raise ConfigError(f"{section.name}.{field.name} has no value")

    @property
    def data_parallel(self) -> int:
        """Ranks that hold the same weights and read different samples."""
        cut = self.parallel
        return cut.world_size // (cut.tensor_parallel * cut.pipeline_parallel * cut.sequence_parallel)

    @property
    def zero_ranks(self) -> int:
        """Ranks that share out one copy of the states: those of DP x SP, or of a MiCS shard."""
        return self.parallel.mics_shard_size or self.data_parallel * self.parallel.sequence_parallel

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Transformer layers of each pipeline stage; two stages a rank with dualpipev."""
        cut = self.parallel
        stages = cut.pipeline_parallel * num_stages_per_rank(cut.pipeline_schedule)
        if cut.pipeline_cuts:
            return parse_cuts(cut.pipeline_cuts)
        return balanced_blocks(self.model.num_layers, stages, *self.layer_costs)

    @property
    def layer_costs(self) -> tuple[int, int]:
        """FLOPs per token of a block's and of the head's forward pass."""
        architecture = self.architecture
        head = architecture.head_flops(self.model, self.parallel.tensor_parallel)
        return architecture.block_flops(self.model), head

    @property
    def layout(self) -> Layout:
        """How the ranks are laid out on the axes."""
        cut = self.parallel
        return Layout(
            tp=cut.tensor_parallel,
            pp=cut.pipeline_parallel,
            dp=self.data_parallel,
            sp=cut.sequence_parallel,
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128 x TP."""
        return self.model.padded_vocab_size(self.parallel.tensor_parallel)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all ranks."""
        return self.train.global_batch_size * self.model.seq_length

    @property
    def architecture(self) -> Architecture:
        """The model's family."""
        return ARCHITECTURES[self.model.architecture]

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, padding of the vocabulary included."""
        return self.architecture.parameters(self.model, self.parallel.tensor_parallel)

    @property
    def label(self) -> str:
        """Name of the model as the log's ARCHITECTURE box and the default run name show it."""
        return presets.label(self.model.model_arch, self.model.num_layers)

    @property
    def run_folder(self) -> Path:
        """Folder that holds all that the run writes."""
        chosen = self.checkpoint.run_dir
        return Path(chosen) if chosen else Path("runs") / self.checkpoint.run_name

    @property
    def checkpoint_folder(self) -> Path:
        """Folder that checkpoints are saved into."""
        chosen = self.checkpoint.save
        return Path(chosen) if chosen else self.run_folder / "checkpoints"

    @property
    def load_folder(self) -> Path:
        """Folder that the run resumes from."""
        return Path(self.checkpoint.load) if self.checkpoint.load else self.checkpoint_folder

    @property
    def skip_ranges(self) -> tuple[tuple[int, int], ...]:
        """Steps not to train on: inclusive, 1-based, merged and sorted."""
        return skip.parse_ranges(self.data.train_range_to_skip or "")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready sections of plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Rebuild what `to_dict` gave.

        Raises:
            ConfigError: for a section or field that this version does not know, or a missing one.
        """
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            given = values.get(name)
            if not isinstance(given, Mapping):
                raise ConfigError(f"run.json has no section {name!r}")
            unknown = sorted(set(given) - {field.name for field in dataclasses.fields(section)})
            if unknown:
                raise ConfigError(f"run.json: section {name!r} has unknown fields {', '.join(unknown)}")
            sections[name] = section(**given)
        unknown = sorted(set(values) - set(SECTIONS) - {"machine"})
        if unknown:
            raise ConfigError(f"run.json has unknown sections {', '.join(unknown)}")
        return cls(**sections, machine=values.get("machine", "generic"))


SECTIONS: dict[str, type[Any]] = {
    "model": ModelShape,
    "parallel": ParallelConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "launch": LaunchConfig,
}


@functools.cache
def options() -> tuple[Option, ...]:
    """All options, in the schema's order."""
    return tuple(
        Option(
            key=f"{section}.{field.name}",
            kind=str(field.type).partition(" |")[0],
            default=field.default,
            **{
                word: field.metadata[word] for word in ("env", "flags", "help", "choices", "limits")
            },
        )
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    )


@functools.cache
def by_variable() -> dict[str, Option]:
    """Variable (canonical and other names) -> option."""
    return {name: option for option in options() for name in option.env}


@functools.cache
def by_flag() -> dict[str, Option]:
    """Flag (all spellings) -> option."""
    return {flag: option for option in options() for flag in option.flags}


@functools.cache
def by_key() -> dict[str, Option]:
    """`<section>.<field>` -> option."""
    return {option.key: option for option in options()}

"""The configuration: frozen sections, one field per line with its variables, flags, default and help.

A field is the only place an option is named: `--help`, the README's table, parsing and run.json come from it.
`None` stands for "not set": resolve.py fills every such field from preset, machine or arithmetic, or leaves it off.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import batch_sizes, labels, skip, update_rules
from megatron.config.engine_choice import ENGINES, LIMITS, ShardedSettings, limit
from megatron.config.errors import ConfigError
from megatron.config.layout import Layout
from megatron.config.option import Option, option
from megatron.config.pipeline_stages import balanced_blocks, num_stages_per_rank, parse_cuts
from megatron.config.schedule import STYLES
from megatron.config.shape import ModelShape
from megatron.model.architecture import Architecture
from megatron.model.registry import ARCHITECTURES

TOKENIZER_TYPES = (
    "HFTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "Llama2Tokenizer",
    "ByteTokenizer", "CharTokenizer", "NullTokenizer", "BuiltinTokenizer",
)  # fmt: skip

DATA_ORDERS = ["stateless", "megatron"]  # made in training/run_data.py

RUN_FILE = "run.json"
"""In a run's folder: the configuration, where each value came from, and the run's provenance."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are divided over the ranks."""

    tensor_parallel: int = option(None, "TP", "--tensor-model-parallel-size --tp", "tensor-parallel size: each weight matrix is sharded over this many ranks; default 1 (2 on Perlmutter, as in the reference)", least=1)
    pipeline_parallel: int = option(1, "PP", "--pipeline-model-parallel-size --pp", "pipeline-parallel size: the layers are split into this many stages", least=1)
    pipeline_schedule: str = option("1f1b", "PIPELINE_SCHEDULE", "--pipeline-schedule", "pipeline schedule: 1f1b, or dualpipev (two stages per rank; needs GRAD_ACC_STEPS of 2 x PP or more)", ("1f1b", "dualpipev"))
    pipeline_cuts: str | None = option(None, "PIPELINE_CUTS", "--pipeline-cuts", "layers per pipeline stage, such as `5,6,6,5`; default: balanced by FLOPs, output head included")
    sequence_parallel: int = option(1, "SP", "--ds-sequence-parallel-size --sp", "Ulysses sequence-parallel size: the sequence of each sample is split over this many ranks", least=1)
    megatron_sequence_parallel: bool = option(False, "SEQUENCE_PARALLEL", "--sequence-parallel", "Megatron's sequence parallelism: norms and residual stream are sharded along the sequence over the TP ranks")
    zero_stage: int = option(1, "ZERO_STAGE", "--zero-stage", "ZeRO stage: 0 off, 1 shards optimizer states, 2 also gradients, 3 also parameters", most=3)
    zero_hpz_partition_size: int = option(1, "ZERO_HPZ_PARTITION_SIZE", "--zero-hpz-partition-size", "ZeRO-3: size of the secondary parameter partition (hpZ), usually the ranks of a host; 1: off", least=1)
    mics_shard_size: int = option(0, "MICS_SHARD_SIZE", "--mics-shard-size", "MiCS: ZeRO-3 shards within groups of this many ranks and replicates across the groups; 0: off")
    cpu_optimizer: bool = option(False, "CPU_OPTIMIZER", "--cpu-optimizer", "offload optimizer states and the optimizer step to the host")
    engine: str = option("auto", "ENGINE", "--engine", "who takes the optimizer's step: sharded (ours: PP=1, ZeRO 0 to 2, bf16 or fp32), deepspeed, or auto: ours where it can", ENGINES)
    world_size: int = option(None, "WORLD_SIZE", "--world-size", "total number of ranks; default: from the scheduler, or TP x PP x SP without an accelerator", least=1)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model: TP x PP x SP."""
        return self.tensor_parallel * self.pipeline_parallel * self.sequence_parallel


@dataclass(frozen=True)
class TrainConfig:
    """Batch, length, precision and memory."""

    micro_batch_size: int = option(None, "MICRO_BATCH", "--micro-batch-size", "samples per micro-batch on each data-parallel rank; default from the machine table", least=1)
    gradient_accumulation_steps: int = option(None, "GRAD_ACC_STEPS GAS", "--gradient-accumulation-steps", "micro-batches per step, whose gradients are accumulated; default from the machine table", least=1)
    global_batch_size: int = option(None, "GLOBAL_BATCH", "--global-batch-size", "samples per step over all ranks = MICRO_BATCH x GRAD_ACC_STEPS x DP", least=1)
    train_iters: int = option(None, "TRAIN_ITERS TRAIN_ITER", "--train-iters", "number of training steps", least=1)
    train_tokens: int = option(None, "TRAIN_TOKENS", "--train-tokens", "number of training tokens, an alternative to TRAIN_ITERS", least=1)
    train_samples: int | None = option(None, "TRAIN_SAMPLES", "--train-samples", "number of training samples, an alternative to TRAIN_ITERS", least=1)
    rampup_batch_size: str | None = option(None, "RAMPUP_BATCH_SIZE", "--rampup-batch-size", "`START INCREMENT SAMPLES`: samples per step grow from START by INCREMENT to GLOBAL_BATCH, evenly over SAMPLES samples")
    exit_duration_mins: float | None = option(None, "EXIT_DURATION_IN_MINS", "--exit-duration-in-mins", "minutes after which the run saves and stops; unset: never", above=0)
    exit_interval: int | None = option(None, "EXIT_INTERVAL", "--exit-interval", "save and stop at a step that is a multiple of this; unset: never", least=1)
    seed: int = option(1234, "SEED", "--seed", "random seed of the initial weights and of the sample order")
    dtype: str = option(None, "DTYPE", "--dtype", "precision of weights and activations; default bf16 (Polaris: fp16), fp32 on a CPU without AMX", ("bf16", "fp16", "fp32"))
    float8: str = option("0", "FP8", "--fp8", "DTYPE=bf16: the blocks' matrix products in fp8, by torchao, on NVIDIA from compute capability 8.9 and AMD MI300 on: 0 off, 1 one scale per matrix, rowwise one per row; emulated has the numbers of 1 on any device, slowly", ("0", "1", "rowwise", "emulated"))
    grad_reduce_in_bf16: bool = option(False, "GRAD_REDUCE_IN_BF16", "--grad-reduce-in-bf16", "DTYPE=bf16: average gradients over the ranks in bf16, which halves the traffic; 0: in fp32")
    activation_checkpointing: str = option("0", "USE_ACTIVATION_CHECKPOINTING", "--recompute-granularity", "activation checkpointing: 0 off, 1 recomputes whole layers, selective recomputes attention and SwiGLU's product", ("0", "1", "selective"))
    checkpoint_num_layers: int = option(1, "ACT_CKPT_NUM_LAYERS", "--checkpoint-num-layers --recompute-num-layers", "layers that are recomputed together: only the input of each such group is kept", least=1)
    compile: str = option("auto", "COMPILE", "--compile", "torch.compile each layer: 0 off, 1 on, auto on accelerators only", ("auto", "0", "1"))
    no_flash_attention: bool = option(False, "NO_FLASH_ATTN", "--no-flash-attn", "compute attention by plain matrix products instead of a fused kernel")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    optimizer: str = option("adamw", "OPT OPTIMIZER OPTIM", "--optimizer", "optimizer: " + ", ".join(update_rules.accepted()))
    learning_rate: float = option(2e-4, "LR", "--lr", "peak learning rate", above=0)
    min_learning_rate: float = option(0.0, "MIN_LR", "--min-lr", "minimum learning rate, reached at the end of the decay")
    lr_decay_style: str = option("cosine", "LR_DECAY_STYLE", "--lr-decay-style", "learning rate schedule after warm-up", STYLES)
    lr_warmup_fraction: float = option(0.05, "LR_WARMUP_FRAC LR_WARMUP_FRACTION", "--lr-warmup-fraction", "fraction of LR_DECAY_ITERS spent in linear warm-up; of its samples with RAMPUP_BATCH_SIZE", below=1)
    lr_warmup_iters: int | None = option(None, "LR_WARMUP_ITERS", "--lr-warmup-iters", "steps of linear warm-up, instead of LR_WARMUP_FRAC")
    lr_warmup_tokens: int | None = option(None, "LR_WARMUP_TOKENS", "--lr-warmup-tokens", "tokens of linear warm-up, instead of LR_WARMUP_FRAC")
    lr_warmup_samples: int | None = option(None, "LR_WARMUP_SAMPLES", "--lr-warmup-samples", "samples of linear warm-up, instead of LR_WARMUP_FRAC")
    lr_decay_iters: int = option(None, "LR_DECAY_ITERS", "--lr-decay-iters", "steps until the decay ends, warm-up included; default TRAIN_ITERS", least=1)
    lr_decay_samples: int | None = option(None, "LR_DECAY_SAMPLES", "--lr-decay-samples", "samples until the decay ends, instead of LR_DECAY_ITERS", least=1)
    lr_decay_tokens: int | None = option(None, "LR_DECAY_TOKENS", "--lr-decay-tokens", "tokens until the decay ends, instead of LR_DECAY_ITERS", least=1)
    lr_cooldown_fraction: float = option(0.65, "LR_COOLDOWN_FRACTION", "--lr-cooldown-fraction", "infinite-*: fraction of LR_DECAY_ITERS for the cooldown from LR to LR_CONSTANT; for warmup-stable-decay use LR_DECAY_FRACTION", most=1)
    lr_constant: float = option(1.1e-4, "LR_CONSTANT", "--constant-lr", "infinite-*: learning rate of the constant phase")
    lr_constant_fraction: float = option(0.001, "LR_CONSTANT_FRACTION", "--lr-constant-fraction", "infinite-*: fraction of LR_DECAY_ITERS at LR_CONSTANT", most=1)
    lr_timescale: float = option(10.0, "LR_TIMESCALE", "--timescale", "infinite-inv-square-root: time scale of the decay to LR_CONSTANT", above=0)
    lr_decay_fraction: float = option(0.1, "LR_DECAY_FRACTION", "--lr-decay-fraction", "warmup-stable-decay: fraction of LR_DECAY_ITERS spent decaying, at the end", most=1)
    lr_finder: bool = option(False, "LR_FINDER", "--lr-finder", "raise the learning rate from MIN_LR (default LR / 1e6) to LR (default 1) exponentially over TRAIN_ITERS, to see where the loss breaks away; nothing is saved")
    adam_beta1: float = option(0.9, "ADAM_BETA1", "--adam-beta1", "decay rate of the first moment", below=1)
    adam_beta2: float = option(0.95, "ADAM_BETA2", "--adam-beta2", "decay rate of the second moment", below=1)
    adam_eps: float = option(1e-5, "ADAM_EPS", "--adam-eps", "epsilon added to the square root of the second moment", above=0)
    sgd_momentum: float = option(0.0, "SGD_MOMENTUM", "--sgd-momentum", "sgd: momentum", below=1)
    muon_momentum: float = option(0.95, "MUON_MOMENTUM", "--muon-momentum", "muon: momentum", below=1)
    sophia_rho: float = option(0.05, "SOPHIA_RHO", "--sophiag-rho", "sophiag: clipping threshold; a larger one clips fewer elements to the sign of the momentum", above=0)
    sophia_beta1: float = option(0.965, "SOPHIA_BETA1", "--sophiag-beta1", "sophiag: decay rate of the momentum", below=1)
    sophia_beta2: float = option(0.99, "SOPHIA_BETA2", "--sophiag-beta2", "sophiag: decay rate of the Hessian's diagonal", below=1)
    sophia_hessian_interval: int = option(10, "SOPHIA_HESSIAN_INTERVAL", "--sophiag-hessian-interval", "sophiag: steps between estimates of the Hessian's diagonal", least=1)
    weight_decay: float = option(0.1, "WEIGHT_DECAY", "--weight-decay", "decoupled weight decay of the weight matrices (norms are not decayed)")
    weight_decay_incr_style: str = option("constant", "WEIGHT_DECAY_INCR_STYLE", "--weight-decay-incr-style", "how the weight decay goes from START_WEIGHT_DECAY to END_WEIGHT_DECAY over the run", ("constant", "linear", "cosine"))
    start_weight_decay: float | None = option(None, "START_WEIGHT_DECAY", "--start-weight-decay", "weight decay of the first step, with WEIGHT_DECAY_INCR_STYLE=linear or cosine")
    end_weight_decay: float | None = option(None, "END_WEIGHT_DECAY", "--end-weight-decay", "weight decay of the last step, with WEIGHT_DECAY_INCR_STYLE=linear or cosine")
    clip_grad: float = option(1.0, "CLIP_GRAD", "--clip-grad", "maximum gradient norm: larger gradients are scaled down to it; 0: no clipping")


@dataclass(frozen=True)
class DataConfig:
    """What is read, in which order, with which tokenizer."""

    data: str | None = option(None, "DATA", "--data", "text to train on: a file (.txt, .jsonl, .parquet, ...), a folder, or `hub:NAME` of a data set of the Hugging Face Hub; prepared once with the given tokenizer, else the built-in one")
    data_key: str = option("text", "DATA_KEY", "--data-key", "DATA: the key of JSON lines, or the column of a table, that holds the text")
    data_file_list: str = option(None, "DATA_FILE_LIST", "--data-file-list", "file with one `weight prefix corpus` line per data file, or `builtin`; default ALCF/data-lists/<machine>/dolma.txt, elsewhere builtin")
    order: str = option("stateless", "DATA_ORDER", "--data-order", "sample order: stateless (computed from the step number) or megatron (bit-exact with the reference)", DATA_ORDERS)
    blend_sample_in_corpus: bool = option(False, "BLEND_SAMPLE_IN_CORPUS", "--blend-sample-in-corpus", "DATA_ORDER=megatron: blend the files within each corpus; 0: read them one after another")
    shuffle_sample_in_corpus: bool = option(True, "SHUFFLE_SAMPLE_IN_CORPUS", "--shuffle-sample-in-corpus", "DATA_ORDER=megatron: shuffle the samples within each corpus")
    train_data_exact_num_epochs: int | None = option(None, "TRAIN_DATA_EXACT_NUM_EPOCHS", "--train-data-exact-num-epochs", "DATA_ORDER=megatron: number of epochs over every training file; unset: as many as needed", least=1)
    cache_path: str | None = option(None, "DATA_CACHE_PATH", "--data-cache-path", "folder of the text that DATA prepares, and of the cached sample order of DATA_ORDER=megatron; default data-cache beside the run's folder")
    train_split: float = option(990, "TRAIN_SPLIT", "--train-split", "share of each file used for training, relative to the other two", above=0)
    valid_split: float = option(10, "VAL_SPLIT", "--val-split", "share of each file used for validation")
    test_split: float = option(0, "TEST_SPLIT", "--test-split", "share of each file used for testing")
    valid_data_file_list: str | None = option(None, "VALID_DATA_FILE_LIST", "--valid-data-file-list", "list of validation data, all of each file; default: VAL_SPLIT of DATA_FILE_LIST, a share that stays out of training either way (VAL_SPLIT=0 trains on it)")
    test_data_file_list: str | None = option(None, "TEST_DATA_FILE_LIST", "--test-data-file-list", "list of test data, as VALID_DATA_FILE_LIST; evaluated once, after the last step")
    allow_data_change: bool = option(False, "ALLOW_DATA_CHANGE", "--allow-data-change", "allow resuming with other data than the checkpoint's: a new data stage begins at the step of the resume")
    eod_mask_loss: bool = option(False, "EOD_MASK_LOSS", "--eod-mask-loss", "leave out the loss at end-of-document tokens, which predict the next document; the mean is over the tokens left in the global batch")
    reset_position_ids: bool = option(False, "RESET_POSITION_IDS", "--reset-position-ids", "count positions (RoPE) from the start of each document in a sample")
    reset_attention_mask: bool = option(False, "RESET_ATTENTION_MASK", "--reset-attention-mask", "a token attends to its own document only; without CUDA its mask takes MICRO_BATCH x SEQ x SEQ bytes")
    tokenizer_type: str = option(None, "TOKENIZER_TYPE", "--tokenizer-type", "type of tokenizer; default the one that DATA_FILE_LIST's files name, for DATA and the built-in corpus BuiltinTokenizer, else HFTokenizer", TOKENIZER_TYPES)
    tokenizer_model: str | None = option(None, "TOKENIZER_MODEL", "--tokenizer-model", "name or path of the tokenizer; default google/gemma-7b on HPC machines")
    train_range_to_skip: str | None = option(None, "TRAIN_RANGE_TO_SKIP", "--train-range-to-skip", "steps to skip without training: `10 20 25 30`, `10-20,25-30` or `@file`; inclusive, numbered as in the log")

    @property
    def follows_documents(self) -> bool:
        """Whether the ends of documents decide on masks, positions or losses."""
        return self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask


@dataclass(frozen=True)
class CheckpointConfig:
    """The run's folder and what is saved into it."""

    run_name: str = option(None, "RUN_NAME", "--run-name", "name of the run; its folder is runs/<name>; default <arch>-seq<SEQ>-<data list>, the arch with every integer that is not the preset's")
    run_dir: str | None = option(None, "RUN_DIR", "--run-dir", "path of the run's folder, instead of runs/<RUN_NAME>")
    resume: str | None = option(None, "RESUME", "--resume", "run to resume, its folder or its name under runs/: its own configuration, with the changes given beside it")
    save: str | None = option(None, "CKPT_DIR SAVE", "--save", "folder that checkpoints are saved to; default <run folder>/checkpoints")
    load: str | None = option(None, "LOAD", "--load", "folder of checkpoints that a run without its own begins from, which must hold some; with FINETUNE also a Hugging Face folder; default: the one that checkpoints are saved to")
    finetune: bool = option(False, "FINETUNE", "--finetune", "begin a new run with the weights in LOAD: step 0, new optimizer and schedule, any data; later starts go on from its own checkpoints")
    no_load_optim: bool = option(False, "NO_LOAD_OPTIM", "--no-load-optim", "resume step and weights, with a new optimizer; acts once: checkpoints saved under it hold its states")
    no_load_rng: bool = option(False, "NO_LOAD_RNG", "--no-load-rng", "no effect: a checkpoint holds no random states")
    save_interval: int = option(50, "SAVE_INTERVAL", "--save-interval", "steps between checkpoints; 0: only at the end")
    exit_on_missing_checkpoint: bool = option(False, "", "--exit-on-missing-checkpoint", "exit with status 4 if there is no usable checkpoint to resume from")
    async_save: bool = option(False, "ASYNC_SAVE", "--async-save", "write checkpoints behind the steps: a step waits for the copy to host memory only")
    keep_last: int | None = option(None, "KEEP_LAST", "--keep-last", "checkpoints to keep, the newest; unset: all", least=1)
    keep_every: int | None = option(None, "KEEP_EVERY", "--keep-every", "with KEEP_LAST: also keep checkpoints of steps that are a multiple of this", least=1)
    keep_best: int | None = option(None, "KEEP_BEST", "--keep-best", "with KEEP_LAST: also keep this many checkpoints of the lowest validation loss", least=1)
    export_hf: bool = option(False, "EXPORT_HF", "--export-hf", "export each checkpoint as a Hugging Face folder, huggingface/step-N in the run's folder")


@dataclass(frozen=True)
class StabilityConfig:
    """What is done about losses that are not finite or that spike."""

    spike_policy: str = option("warn", "SPIKE_POLICY", "--spike-policy", "on a spike of loss or gradient norm: off, warn, skip the update, or rollback to an earlier checkpoint and skip the suspect steps", ("off", "warn", "skip", "rollback"))
    spike_threshold: float = option(8.0, "SPIKE_THRESHOLD", "--spike-threshold", "robust z-score (distance from the median in standard deviations estimated from the MAD) above which loss or gradient norm is a spike", above=0)
    spike_window: int = option(128, "SPIKE_WINDOW", "--spike-window", "past steps that a step's loss and gradient norm are compared with, from half of it on", least=16)
    rollback_steps: int = option(20, "ROLLBACK_STEPS", "--rollback-steps", "SPIKE_POLICY=rollback: resume from the newest checkpoint at least this many steps before the spike", least=1)
    max_rollbacks: int = option(3, "MAX_ROLLBACKS", "--max-rollbacks", "SPIKE_POLICY=rollback: after this many the run ends with status 5")
    max_bad_steps: int = option(20, "MAX_BAD_STEPS", "--max-bad-steps", "steps in a row without an update (not finite, or refused as a spike) after which the run ends with status 5; 0: never")


@dataclass(frozen=True)
class LogConfig:
    """Evaluation, log lines, trackers and debugging."""

    log_interval: int = option(1, "LOG_INTERVAL", "--log-interval", "steps between log lines", least=1)
    eval_interval: int = option(100, "EVAL_INTERVAL", "--eval-interval", "steps between evaluations; 0: never")
    eval_iters: int = option(20, "EVAL_ITERS", "--eval-iters", "batches per evaluation", least=1)
    sample_prompt: str | None = option(None, "SAMPLE_PROMPT", "--sample-prompt", "text that the model continues at each evaluation, on the log and in metrics.jsonl; with SAMPLE_INTERVAL the default is the start of a validation sample")
    sample_interval: int = option(0, "SAMPLE_INTERVAL", "--sample-interval", "steps between sampled texts; 0: at each evaluation, where SAMPLE_PROMPT is set")
    wandb_project: str = option("AuroraGPT", "WANDB_PROJECT WB_PROJECT", "--wandb-project", "Weights & Biases project")
    wandb_mode: str | None = option(None, "WANDB_MODE", "--wandb-mode", "Weights & Biases mode; disabled without an API key (logged once)", ("online", "offline", "disabled"))
    wandb_disabled: bool = option(False, "WANDB_DISABLED", "--wandb-disabled", "disable Weights & Biases")
    no_tensorboard: bool = option(False, "NO_TENSORBOARD", "--no-tensorboard", "write no TensorBoard files")
    tensorboard_dir: str | None = option(None, "TENSORBOARD_DIR", "--tensorboard-dir", "folder of the TensorBoard files; default tensorboard in the run's folder")
    wandb_exp_name: str | None = option(None, "WANDB_EXP_NAME WANDB_NAME", "--wandb-exp-name", "name of the run in Weights & Biases; default RUN_NAME")
    wandb_run_id: str | None = option(None, "WANDB_RUN_ID", "--wandb-run-id", "id of the run in Weights & Biases; default: made at the first start, kept in the run's folder")
    wandb_group: str | None = option(None, "WANDB_RUN_GROUP", "--wandb-group", "group of the run in Weights & Biases")
    wandb_tags: str | None = option(None, "WANDB_TAGS", "--wandb-tags", "tags of the run in Weights & Biases, separated by commas; default: model and machine")
    wandb_notes: str | None = option(None, "WANDB_NOTES", "--wandb-notes", "a line about the run for Weights & Biases")
    wandb_dir: str | None = option(None, "WANDB_DIR", "--wandb-save-dir", "folder of the files of Weights & Biases; default wandb in the run's folder")
    log_params_norm: bool = option(False, "LOG_PARAMS_NORM", "--log-params-norm", "log the norm of all parameters")
    log_num_zeros_in_grad: bool = option(False, "LOG_NUM_ZEROS_IN_GRAD", "--log-num-zeros-in-grad", "log the number of gradient elements that are zero")
    log_optimizer_states: bool = option(False, "LOG_OPTIMIZER_STATES", "--log-optimizer-states-to-tensorboard", "log norms and largest elements of the optimizer's states")
    timing_log_level: int = option(0, "TIMING_LOG_LEVEL", "--timing-log-level", "0: off; 1: log the seconds of a step's phases, the fastest and the slowest rank's; 2: the same", most=2)
    profile: str = option("off", "PROFILE", "--profile", "profile some steps into `profile` in the run's folder: torch (Chrome trace, table) or pyinstrument (call tree as html and text; an extra)", ("off", "torch", "pyinstrument"))
    profile_steps: str | None = option(None, "PROFILE_STEPS", "--profile-steps --profile_steps", "first and last step that is profiled, `10 12`; default: 10 to 12, with pyinstrument 1 to 100, at most the run's last")
    profile_ranks: str = option("0", "PROFILE_RANKS", "--profile-ranks", "ranks that are profiled, `0 4`, or `all`")
    trace_dir: str | None = option(None, "TRACE_DIR", "--trace-dir", "folder of the profiles; default profile in the run's folder")
    log_corpus_loss: bool = option(False, "LOG_CORPUS_LOSS", "--log-corpus-loss", "log the training loss of each corpus, to the console and to the metrics")
    dump_tokens: bool = option(False, "DUMP_TOKENS", "--dump-tokens", "print the tokens of the first ten steps")
    dump_skipped_iters: bool = option(False, "DUMP_SKIPPED_ITERS", "--dump-skipped-iters", "print the tokens of skipped steps, which are then read")
    log_level: str = option("INFO", "LOG_LEVEL", "--log-level", "lowest level that is logged", ("DEBUG", "INFO", "WARNING", "ERROR"))
    log_from_all_ranks: bool = option(False, "LOG_FROM_ALL_RANKS", "--log-from-all-ranks", "every rank logs what rank 0 does, with its rank; 0: warnings and errors alone")
    log_style: str = option("auto", "LOG_STYLE", "--log-style", "auto, live: short lines above a live bar on a terminal, line: full lines (always so in output.log and where no terminal is)", ("auto", "live", "line"))
    debug: bool = option(False, "DEBUG", "--debug", "trace the shell script and log at level DEBUG")
    dry_run: bool = option(False, "DRY_RUN", "--dry-run", "print the plan and start nothing")

    @property
    def look_interval(self) -> int:
        """Steps after which an evaluation or a sampled text may be due; 0: after the last only."""
        return math.gcd(self.eval_interval, self.sample_interval)


@dataclass(frozen=True)
class LaunchConfig:
    """Where the ranks run."""

    hostfile: str | None = option(None, "HOSTFILE", "--hostfile", "file with one host per line; default: the scheduler's")
    num_hosts: int = option(None, "NHOSTS", "--nhosts", "number of hosts; default: all of the host file", least=1)
    devices_per_host: int = option(None, "NGPU_PER_HOST", "--ngpu-per-host", "ranks per host, one per accelerator; default from the machine table")
    device: str = option("auto", "DEVICE", "--device", "device of the ranks; auto: the accelerator, which must be there where the machine has one; cpu: never an accelerator", ("auto", "cpu", "cuda", "xpu"))
    cpu_bind: str | None = option(None, "CPU_BIND", "--cpu-bind", "CPU binding, as mpiexec or srun spells it; default from the machine table")
    retries: int = option(0, "RETRIES", "--retries", "restarts after a failure or a hang, each from the newest sound checkpoint")
    hang_timeout: float | None = option(None, "HANG_TIMEOUT", "--hang-timeout", "seconds without progress after which a run counts as hung (status 124); unset: learnt from its steps; 0: never")
    distributed_timeout_minutes: float = option(30.0, "DISTRIBUTED_TIMEOUT_MINUTES", "--distributed-timeout-minutes", "minutes that a collective, or the start of the ranks, waits for the others", above=0)
    ignore_variables: str | None = option(None, "IGNORE_VARIABLES", "--ignore-variables", "names of variables, separated by commas, that look like options and are meant for something else")
    launch_with: str | None = option(None, "LAUNCH_WITH", "--launch-with", "launcher; default from the machine table; MPICH is mpiexec", ("mpiexec", "srun", "mpirun", "torchrun", "local", "deepspeed", "MPICH"))


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run: made once before launch, never changed, written to run.json."""

    model: ModelShape
    parallel: ParallelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    stability: StabilityConfig
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
        return self.parallel.world_size // self.parallel.model_parallel_size

    @property
    def zero_ranks(self) -> int:
        """Ranks that ZeRO shards one set of states over: those of DP x SP, or of a MiCS shard group."""
        return self.parallel.mics_shard_size or self.data_parallel * self.parallel.sequence_parallel

    @property
    def sharded(self) -> ShardedSettings | None:
        """What the sharded engine is given, None where DeepSpeed takes the steps."""
        train, stage = self.train, self.parallel.zero_stage
        values = {one.key: operator.attrgetter(one.key)(self) for one in LIMITS}
        if self.parallel.engine == "deepspeed" or limit(values):
            return None
        sent_in = "bf16" if train.grad_reduce_in_bf16 else "fp32"
        return ShardedSettings(train.dtype, sent_in, train.gradient_accumulation_steps, stage == 2, self.optimizer.clip_grad)

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Transformer layers of each pipeline stage; two stages per rank with dualpipev."""
        parallel = self.parallel
        stages = parallel.pipeline_parallel * num_stages_per_rank(parallel.pipeline_schedule)
        if parallel.pipeline_cuts:
            return parse_cuts(parallel.pipeline_cuts)
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
        parallel = self.parallel
        return Layout(
            tp=parallel.tensor_parallel,
            pp=parallel.pipeline_parallel,
            dp=self.data_parallel,
            sp=parallel.sequence_parallel,
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128 x TP."""
        return self.model.padded_vocab_size(self.parallel.tensor_parallel)

    @property
    def batch_sizes(self) -> batch_sizes.BatchSizes:
        """Samples of each step over all ranks."""
        return batch_sizes.parse(self.train.rampup_batch_size, self.train.global_batch_size)

    @property
    def total_samples(self) -> int:
        """Samples of all steps."""
        return self.batch_sizes.consumed(self.train.train_iters)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step over all ranks, once the batch has its full size."""
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
        return labels.label(
            self.model.model_arch, lambda key: getattr(self.model, key.partition(".")[2])
        )

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
            given = values.get(name, {} if section is StabilityConfig else None)
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


def read_run(path: str | Path) -> RunConfig:
    """The configuration in a run.json.

    Raises:
        ConfigError: where it cannot be read or is not one of this version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"--config {path} is not a run.json: it has no section 'config'")
    return RunConfig.from_dict(record["config"])


SECTIONS: dict[str, type[Any]] = {
    "model": ModelShape,
    "parallel": ParallelConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "stability": StabilityConfig,
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

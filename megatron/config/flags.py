"""The command line: schema flags, Megatron's spellings, and why others are refused."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.config import schema
from megatron.config.errors import ConfigError

# Bare flags that set one option to a fixed value.
SHORTHANDS: dict[str, tuple[str, str]] = {
    "--bf16": ("train.dtype", "bf16"),
    "--fp16": ("train.dtype", "fp16"),
    "--fp32": ("train.dtype", "fp32"),
    "--checkpoint-activations": ("train.activation_checkpointing", "1"),
    "--deepspeed-activation-checkpointing": ("train.activation_checkpointing", "1"),
    "--recompute-activations": ("train.activation_checkpointing", "selective"),
    "--untie-embeddings-and-output-weights": ("model.tie_embeddings", "0"),
    "--no-pipeline-parallel": ("parallel.pipeline_parallel", "1"),
}

# Bare flags whose effect is always on.
ALWAYS: dict[str, str] = {
    "--swiglu": "the MLP is SwiGLU",
    "--use-rotary-position-embeddings": "positions are rotary",
    "--no-position-embedding": "positions are rotary",
    "--disable-bias-linear": "linear layers have no bias",
    "--no-query-key-layer-scaling": "attention scores are not scaled by layer",
    "--accumulate-allreduce-grads-in-fp32": "bf16 gradients are averaged in fp32",
    "--attention-softmax-in-fp32": "the softmax is computed in fp32",
    "--deepspeed": "DeepSpeed is the engine",
    "--no-masked-softmax-fusion": "there is no such fusion",
    "--no-bias-gelu-fusion": "there is no such fusion",
    "--no-bias-dropout-fusion": "there is no such fusion",
    "--no-gradient-accumulation-fusion": "there is no such fusion",
    "--use-flash-attn": "torch picks the fastest attention kernel",
    "--use-flash-attn-v1": "torch picks the fastest attention kernel",
    "--use-flash-attn-v2": "torch picks the fastest attention kernel",
    "--use-flash-attn-triton": "torch picks the fastest attention kernel",
    "--use-flash-attn-builder": "torch picks the fastest attention kernel",
    "--lazy-mpu-init": "groups are made when they are needed",
}

# Flags of which only one value is supported.
ONLY: dict[str, tuple[str, ...]] = {
    "--normalization": ("rmsnorm", "RMSNorm"),
    "--hidden-dropout": ("0", "0.0"),
    "--attention-dropout": ("0", "0.0"),
    "--make-vocab-size-divisible-by": ("128",),
    "--rotary-percent": ("1", "1.0"),
    "--data-impl": ("mmap", "infer"),
    "--dataloader-type": ("single",),
    "--recompute-method": ("uniform",),
}

# Well-known flags that are refused, with what to do instead.
REFUSED: dict[str, str] = {
    "--lr_constant_plus_cooldown": "use --lr-decay-style warmup-stable-decay",
    "--lr_constant_plus_cooldown_frac": "use --lr-decay-fraction",
    "--train-iters-to-skip": "use --train-range-to-skip first last",
    "--data-path": "write `weight prefix corpus` lines into a file for --data-file-list",
    "--train-data-path": "use --data-file-list and TRAIN_SPLIT",
    "--valid-data-path": "use --data-file-list and VAL_SPLIT",
    "--test-data-path": "use --data-file-list and TEST_SPLIT",
    "--vocab-file": "give the file to --tokenizer-model",
    "--merge-file": "give its folder to --tokenizer-model",
    "--distributed-backend": "the backend follows from the device",
    "--deepspeed_config": "the DeepSpeed configuration is made from the other options",
    "--use-mics": "use --mics-shard-size",
    "--kv-channels": "it is --hidden-size / --num-attention-heads, or --head-dim",
    "--max-position-embeddings": "rotary positions have no table; use --seq-length",
    "--num-layers-per-virtual-pipeline-stage": "the pipeline schedule is 1F1B",
    "--use-distributed-optimizer": "use --zero-stage 1",
    "--num-experts": "models are dense",
    "--loss-scale": "fp16 scales its loss dynamically",
    "--initial-loss-scale": "fp16 scales its loss dynamically",
    "--no-save-optim": "a checkpoint holds the optimizer",
    "--override-opt_param-scheduler": "the options given now always hold",
    "--use-checkpoint-opt_param-scheduler": "the options given now always hold",
    "--batch-size": "use --micro-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--model-parallel-size": "use --tensor-model-parallel-size",
}

# Flags that take the values up to the next flag.
MANY = ("--train-range-to-skip", "--rampup-batch-size")


@dataclass
class CommandLine:
    """What a command line set: (option key, text, flag as written) in order, and notes to print."""

    settings: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read `--flag value`, `--flag=value` and bare flags; problems are gathered, not raised."""
    line, left = CommandLine(), list(argv)
    while left:
        flag, equals, attached = left.pop(0).partition("=")
        most = 0 if equals else _most_values(flag)
        values = list(itertools.takewhile(_is_value, left[:most]))
        del left[: len(values)]
        try:
            _read_flag(line, flag, [attached] if equals else values)
        except ConfigError as error:
            line.problems.append(str(error))
    return line


def _is_value(word: str) -> bool:
    """Whether a word can be a flag's value; `-1` and `-1e-3` can."""
    return not word.startswith("--") and word != "-h"


def _most_values(flag: str) -> int | None:
    """Most words after a flag that are its values; None: all up to the next flag."""
    option = schema.by_flag().get(flag)
    if flag in SHORTHANDS or flag in ALWAYS or not flag.startswith("--"):
        return 0
    if option is not None and flag not in MANY:
        return int(option.kind != "bool")
    return 1 if flag in ONLY or flag == "--split" else None


def _read_flag(line: CommandLine, flag: str, values: Sequence[str]) -> None:
    """Add one flag with its values to `line`."""
    option = schema.by_flag().get(flag)
    if flag in ("-h", "--help"):
        return  # start.py has printed it
    if flag in REFUSED:
        raise ConfigError(f"{flag} is not offered: {REFUSED[flag]}")
    if flag in SHORTHANDS or flag in ALWAYS:
        if values:
            raise ConfigError(f"{flag} takes no value")
        if flag in ALWAYS:
            line.notes.append(f"{flag} changes nothing: {ALWAYS[flag]}")
        else:
            line.settings.append((*SHORTHANDS[flag], flag))
    elif option is not None and option.kind == "bool":
        line.settings.append((option.key, values[0] if values else "1", flag))
    elif option is None and flag not in ONLY and flag != "--split":
        raise ConfigError(_unknown(flag))
    elif not values or not values[0].strip():
        if flag in MANY:
            raise ConfigError(f"{flag} needs values, e.g. {flag} 10 20 25 30")
        raise ConfigError(f"{flag} needs a value: {flag} VALUE or {flag}=VALUE")
    elif option is not None:
        line.settings.append((option.key, " ".join(values), flag))
    elif flag == "--split":
        line.settings += _split_shares(values[0])
    elif values[0] in ONLY[flag]:
        line.notes.append(f"{flag} {values[0]} changes nothing: it is the only value")
    else:
        raise ConfigError(
            f"{flag} {values[0]} is not offered: only {flag} {ONLY[flag][0]} is supported"
        )


def _unknown(flag: str) -> str:
    """The message for an unknown flag."""
    if not flag.startswith("--"):
        return f"{flag!r} is not a flag: flags start with --, variables go before the command"
    known = [*schema.by_flag(), *SHORTHANDS, *ALWAYS, *ONLY, *REFUSED, "--split"]
    close = difflib.get_close_matches(flag, known, n=1)
    return f"{flag} is not a flag of this command. " + (
        f"Did you mean {close[0]}?" if close else "--help lists them."
    )


def _split_shares(text: str) -> list[tuple[str, str, str]]:
    """`--split 990,10,0`: shares for training, validation and testing."""
    parts = text.replace("/", ",").split(",")
    if len(parts) != 3:
        raise ConfigError(
            f"--split {text}: needs three shares, train,valid,test, e.g. --split 990,10,0"
        )
    keys = ("data.train_split", "data.valid_split", "data.test_split")
    return [(key, part, "--split") for key, part in zip(keys, parts, strict=True)]

"""The command line: schema flags, Megatron's spellings, and why others are not taken."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.config import schema
from megatron.config.errors import ConfigError
from megatron.config.option import Option

# Flags without a value that stand for a value of one option.
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

# Flags without a value that ask for what is always so.
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

# Flags with a value of which only one is built.
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

# Flags of the field that are not taken, with what to do instead.
REFUSED: dict[str, str] = {
    "--lr-warmup-iters": "use --lr-warmup-fraction = warm-up steps / --lr-decay-iters",
    "--lr-warmup-samples": "use --lr-warmup-fraction",
    "--lr-decay-samples": "use --lr-decay-iters",
    "--lr-decay-tokens": "use --lr-decay-iters",
    "--lr_constant_plus_cooldown": "use --lr-decay-style warmup-stable-decay",
    "--lr_constant_plus_cooldown_frac": "use --lr-decay-fraction",
    "--train-samples": "use --train-iters or --train-tokens",
    "--rampup-batch-size": "the batch size is constant",
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
    "--no-load-optim": "a resumed run loads its optimizer",
    "--no-save-optim": "a checkpoint holds the optimizer",
    "--override-opt_param-scheduler": "the options given now always hold",
    "--use-checkpoint-opt_param-scheduler": "the options given now always hold",
    "--batch-size": "use --micro-batch-size",
    "--warmup": "use --lr-warmup-fraction",
    "--model-parallel-size": "use --tensor-model-parallel-size",
}

MANY = ("--train-range-to-skip",)  # flags that take the values up to the next flag


@dataclass
class CommandLine:
    """What a command line set: (option key, text, flag as written) in order, and notes to print."""

    settings: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wants_help: bool = False


class _Words:
    """The words of a command line, read from left to right."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._left = list(reversed(argv))
        self._attached: str | None = None

    def next_flag(self) -> str | None:
        """The next word without its `=value`; None at the end."""
        if not self._left:
            return None
        word, equals, value = self._left.pop().partition("=")
        self._attached = value if equals else None
        return word

    @property
    def has_attached(self) -> bool:
        """Whether the current flag was written as flag=value."""
        return self._attached is not None

    def values(self, count: int | None = None) -> list[str]:
        """Up to `count` values of the current flag (None: all); `-1` and `-1e-3` are values."""
        if self._attached is not None:
            return [self._attached]
        values: list[str] = []
        while self._left and len(values) != count:
            if self._left[-1].startswith("--") or self._left[-1] == "-h":
                break
            values.append(self._left.pop())
        return values


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read `--flag value`, `--flag=value` and bare flags; problems are gathered, not raised."""
    line = CommandLine()
    words = _Words(argv)
    while (flag := words.next_flag()) is not None:
        try:
            _read_flag(line, flag, words)
        except ConfigError as error:
            line.problems.append(str(error))
    return line


def _read_flag(line: CommandLine, flag: str, words: _Words) -> None:
    """Enter one flag with its values into `line`."""
    option = schema.by_flag().get(flag)
    if option is not None:
        line.settings.append((option.key, _value_of(option, flag, words), flag))
    elif flag in ("-h", "--help"):
        line.wants_help = True
    elif flag in SHORTHANDS:
        _no_value(flag, words)
        key, text = SHORTHANDS[flag]
        line.settings.append((key, text, flag))
    elif flag in ALWAYS:
        _no_value(flag, words)
        line.notes.append(f"{flag} changes nothing: {ALWAYS[flag]}")
    elif flag == "--split":
        _read_split(line, _one(flag, words))
    elif flag in ONLY:
        value = _one(flag, words)
        if value not in ONLY[flag]:
            raise ConfigError(
                f"{flag} {value} is not offered: only {flag} {ONLY[flag][0]} is built"
            )
        line.notes.append(f"{flag} {value} changes nothing: it is always so")
    elif flag in REFUSED:
        words.values()
        raise ConfigError(f"{flag} is not offered: {REFUSED[flag]}")
    else:
        raise ConfigError(_unknown(flag, words))


def _unknown(flag: str, words: _Words) -> str:
    """What to say of a word that is no flag of ours; its values are passed over."""
    if not flag.startswith("--"):
        return f"{flag!r} is not a flag: flags start with --, variables go before the command"
    words.values()
    known = [*schema.by_flag(), *SHORTHANDS, *ALWAYS, *ONLY, *REFUSED, "--split"]
    close = difflib.get_close_matches(flag, known, n=1)
    return f"{flag} is not a flag of this command. " + (
        f"Did you mean {close[0]}?" if close else "--help lists them."
    )


def _value_of(option: Option, flag: str, words: _Words) -> str:
    """Text of an option's flag: bare booleans are true, ranges take many values, others one."""
    if option.kind == "bool":
        return words.values(1)[0] if words.has_attached else "1"
    if flag in MANY:
        values = words.values()
        if not values or not values[0]:
            raise ConfigError(f"{flag} needs values, e.g. {flag} 10 20 25 30")
        return " ".join(values)
    return _one(flag, words)


def _one(flag: str, words: _Words) -> str:
    values = words.values(1)
    if not values or not values[0].strip():
        raise ConfigError(f"{flag} needs a value: {flag} VALUE or {flag}=VALUE")
    return values[0]


def _no_value(flag: str, words: _Words) -> None:
    if words.has_attached:
        raise ConfigError(f"{flag} takes no value")


def _read_split(line: CommandLine, text: str) -> None:
    """`--split 990,10,0`: shares for training, validation and testing."""
    parts = text.replace("/", ",").split(",")
    if len(parts) != 3:
        raise ConfigError(
            f"--split {text}: needs three shares, train,valid,test, e.g. --split 990,10,0"
        )
    keys = ("data.train_split", "data.valid_split", "data.test_split")
    line.settings += [(key, part, "--split") for key, part in zip(keys, parts, strict=True)]

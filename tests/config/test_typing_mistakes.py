"""What people type, and what the answer must say: a fix, a name, or the value that was meant."""

from __future__ import annotations

import shlex

import pytest

from megatron.launch import start

# Refused, with the fix; where nothing is wrong but the spelling it is taken, below.
REFUSED = """
HEADS=3 NUM_KV_HEAD=3 | 128 / 3 leaves 2 | HEADS=2, or HIDDEN=132
HEADS=3 NUM_KV_HEAD=1 HIDDEN=132 TP=2 | TP=2 does not divide HEADS=3
LR=3e-4x | LR=3e-4x is not a number
LR=-1 | LR=-1.0 | above 0
OPT=adam-w | Did you mean adamw?
OPT=RAdam | is not a known optimizer | adafactor
MODEL_ARCH=llama3 | Did you mean llama3-3B?
MODEL_ARCH=llama-7b | Did you mean 7B?
MODEL_ARCH=gpt-2 | Did you mean gpt2?
MODEL_ARCH=3B | llama3-3B or smollm3-3B
TP=3 | 4 / 3 leaves 1 | Set TP=2
PP=5 | NLAYERS=4: 4 < 5 | Set PP=4
ZERO_STAGE=4 | at most 3
WORLD_SIZE=3 TP=2 | 3 / 2 leaves 1 | WORLD_SIZE=4
SEQ=0 | at least 1
SEQ=8k | write 8192 or 8000
TRAIN_ITERS=100 TRAIN_TOKENS=5 | 2048 tokens per step
TRAIN_ITERS=many | is not a whole number
LR_DECAY_STYLE=cos | Did you mean cosine?
LR_DECAY_STYLE=linaer | Did you mean linear?
LR_DECAY_STYLE=inverse | Did you mean inverse-square-root?
LR_DECAY_STYLE=stable | Did you mean warmup-stable-decay?
TOKENIZER_TYPE=tiktoken | HFTokenizer, SentencePieceTokenizer
TOKENIZER_TYPE=Llama2 | Did you mean Llama2Tokenizer?
WANDB_MODE=ofline | Did you mean offline?
GAS=0 | at least 1
MICRO_BATCH=0 | at least 1
SAVE_INTERVAL=-1 | at least 0
CLIP_GRAD=-1 | at least 0
RUN_NAME=a/b | RUN_DIR
DTYPE=fp8 | Did you mean bf16, with FP8=1?
DEVICE=gpu | Did you mean cuda or xpu?
FP8=yes | DTYPE=bf16
ARCHITECTURE=gpt | Did you mean gpt2?
ARCHITECTURE=gpt2 | set NUM_KV_HEAD=4
TRAIN_RANGE_TO_SKIP=10 | 1 / 2 leaves 1 | 10 10
TRAIN_RANGE_TO_SKIP=20,10 | write 10 20
USE_ACTIVATION_CHECKPOINTING=maybe | 0, 1, selective
SPIKE_POLICY=ignore | off, warn, skip, rollback
LAUNCH_WITH=mpi | mpiexec
--n-layers 8 | Did you mean --num-layers?
--num_layers 8 | Did you mean --num-layers?
--num-layer 8 | Did you mean --num-layers?
--lr | --lr VALUE
num_layers=4 | flags start with --, variables go before the command
NLAYERS=4 HEADS=4 -- NLAYERS=8 | variables go before the command
--config foo | --resume RUN
--tp 2 --tp 4 | --tp=2 and --tp=4
--zero 2 | Did you mean --zero-stage?
--epochs 3 | Did you mean --train-tokens?
--learning-rate 1e-3 | Did you mean --lr?
--batch-size 4 | --micro-batch-size
--dry_run | Did you mean --dry-run?
--train-range-to-skip 10 20 25 | 3 / 2 leaves 1
"""

# A variable that is none: named on a laptop; tests/config/test_resolve.py refuses it in a job.
NAMED = """
NLAYER=8 | NLAYERS
N_LAYERS=8 | NLAYERS
NUM_LAYER=8 | NLAYERS
HIDDEN_SIZE=256 | HIDDEN
NUM_HEADS=4 | HEADS
BATCH_SIZE=8 | MICRO_BATCH
LEARNING_RATE=1e-3 | LR
ZERO=1 | ZERO_STAGE
OPTIMISER=adamw | OPT
TRAIN_STEPS=100 | TRAIN_ITERS
STEPS=100 | TRAIN_ITERS
MAX_STEPS=100 | TRAIN_ITERS
EPOCHS=3 | TRAIN_TOKENS
NUM_TRAIN_EPOCHS=3 | TRAIN_TOKENS
NPROC=4 | WORLD_SIZE
NPROC_PER_NODE=4 | NGPU_PER_HOST
ACT_CKPT=1 | USE_ACTIVATION_CHECKPOINTING
"""

# Taken as meant.
TAKEN = """
OPT=AdamW | optimizer.optimizer | adamw
OPT=Muon | optimizer.optimizer | muon
LR_DECAY_STYLE=wsd | optimizer.lr_decay_style | warmup-stable-decay
LR_DECAY_STYLE=Cosine | optimizer.lr_decay_style | cosine
TRAIN_TOKENS=1B | train.train_iters | 488281
TRAIN_ITERS=1k | train.train_iters | 1000
WANDB_MODE=off | log.wandb_mode | disabled
WANDB_MODE=Offline | log.wandb_mode | offline
DTYPE=BF16 | train.dtype | bf16
DTYPE=half | train.dtype | fp16
COMPILE=true | train.compile | 1
LOG_LEVEL=debug | log.log_level | DEBUG
TOKENIZER_TYPE=builtin | data.tokenizer_type | BuiltinTokenizer
ARCHITECTURE=Llama | model.architecture | llama
LR=1e-4 | optimizer.min_learning_rate | 1e-05
"""


def table(text: str) -> list[tuple[str, list[str]]]:
    """What is typed before or after the command, and the words after it."""
    lines = [line.split(" | ") for line in text.strip().splitlines()]
    return [(typed, words) for typed, *words in lines]


def command(typed: str) -> tuple[list[str], dict[str, str]]:
    """Flags, and variables: those before the first flag or `--`, if what is typed begins so."""
    words, environ = shlex.split(typed), {"DRY_RUN": "1", "IGNORE_VARIABLES": ""}
    while words and words[0].partition("=")[0].isupper() and "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    return words[1:] if words[:1] == ["--"] else words, environ


@pytest.mark.parametrize(("typed", "words"), table(REFUSED), ids=str)
def test_refused_with_a_fix(
    typed: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start.main(*command(typed)) == 2
    answer = capsys.readouterr().err
    assert [word for word in words if word not in answer] == [], answer


@pytest.mark.parametrize(("typed", "words"), table(NAMED), ids=str)
def test_named_with_what_it_is_called(
    typed: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start.main(*command(typed)) == 0
    said = f"{typed} has no effect: the variable is called {words[0]}\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "words"), table(TAKEN), ids=str)
def test_taken_as_meant(typed: str, words: list[str]) -> None:
    _, found, _ = start.check(*command(typed))
    section, _, field = words[0].partition(".")
    assert str(getattr(getattr(found.run, section), field)) == words[1]


def test_they_are_at_least_65() -> None:
    assert sum(len(table(text)) for text in (REFUSED, NAMED, TAKEN)) >= 65

"""MODEL_ARCH: named shapes with their defaults, keyed by the variables they stand in for.

Every value can be overridden by its variable or flag. A name is matched as it is spelled, then,
where that leaves one preset, without regard to case.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.errors import ConfigError

Value = int | float | bool | str


@dataclass(frozen=True)
class Preset:
    """One architecture: its label (`{layers}` is filled in), other names, and its values."""

    label: str
    also: tuple[str, ...]
    values: Mapping[str, Value]


SHAPE = ("NLAYERS", "HIDDEN", "HEADS", "NUM_KV_HEAD", "FFN_HIDDEN_SIZE", "SEQ")


def _shape(*numbers: int, **more: Value) -> dict[str, Value]:
    """The six numbers of a shape under their variables' names, and more values."""
    return {**dict(zip(SHAPE, numbers, strict=True)), **more}


def _hub(model: str, shape: tuple[int, ...], vocabulary: int, theta: float, tied: bool,
         **more: Value) -> tuple[str, Preset]:  # fmt: skip
    """A model of the Hugging Face Hub under its name without the owner."""
    name = model.partition("/")[2]
    values = _shape(
        *shape, TIE_EMBEDDINGS=tied, ROPE_THETA=theta, VOCAB_SIZE=vocabulary,
        TOKENIZER_TYPE="HFTokenizer", TOKENIZER_MODEL=model, **more,
    )  # fmt: skip
    return name, Preset(name, (model,), values)


_QWEN3: dict[str, Value] = {"ARCHITECTURE": "qwen3", "HEAD_DIM": 128, "RMS_NORM_EPS": 1e-6}
_GPT2: dict[str, Value] = {"ARCHITECTURE": "gpt2", "TIE_EMBEDDINGS": True}
_2B_NAMES = ("AuroraGPT-2B", "AuroraGPT_2B", "AuroraGPT2B", "Aurora-GPT-2B", "Aurora_GPT_2B")
_7B_NAMES = ("AuroraGPT-7B", "aurora-gpt-7b", "llama-3.1-7B", "llama-3.2-7B")

# Sources: the AuroraGPT launcher's shapes; config.json of each Hub model, with a SEQ of 8192. The
# AuroraGPT, llama3-3B, smollm3-3B and phi4-mini shapes are untied, with rotary embeddings in every
# layer.
# fmt: off
PRESETS: dict[str, Preset] = {
    "7B": Preset("AuroraGPT-7B", _7B_NAMES, _shape(32, 4096, 32, 8, 11008, 4096)),
    "2B": Preset("AuroraGPT-2B", _2B_NAMES, _shape(12, 2048, 16, 4, 11008, 8192)),
    "llama3-3B": Preset("llama3-3B-nLayers{layers}", ("llama-3B",),
                        _shape(28, 3072, 24, 8, 8192, 8192)),
    "smollm3-3B": Preset("smollm3-nLayers{layers}", ("smollm3_3B",),
                         _shape(36, 2048, 16, 4, 11008, 8192)),
    "phi4-mini": Preset("phi4-mini-nLayers{layers}", ("phi4_mini",),
                        _shape(24, 3072, 32, 8, 8192, 8192)),
    # 78 heads over 6 tensor-parallel ranks: the shape was chosen for TP=6.
    "33B": Preset("AuroraGPT-33B", ("AuroraGPT-33B", "llama-3.2-33B"),
                  _shape(78, 8268, 78, 6, 11076, 4096,
                         TP=6, ZERO_STAGE=2, MICRO_BATCH=1, GRAD_ACC_STEPS=1)),
    "70B": Preset("AuroraGPT-70B", ("AuroraGPT-70B",), _shape(80, 8192, 64, 8, 28672, 8192)),
    **dict([
        _hub("HuggingFaceTB/SmolLM2-135M", (30, 576, 9, 3, 1536, 8192), 49152, 1e5, True),
        _hub("HuggingFaceTB/SmolLM2-360M", (32, 960, 15, 5, 2560, 8192), 49152, 1e5, True),
        _hub("HuggingFaceTB/SmolLM2-1.7B", (24, 2048, 32, 32, 8192, 8192), 49152, 1.3e5, True),
        _hub("HuggingFaceTB/SmolLM3-3B", (36, 2048, 16, 4, 11008, 8192), 128256, 5e6, True,
             NOPE_INTERVAL=4, RMS_NORM_EPS=1e-6),
        _hub("meta-llama/Llama-3.2-1B", (16, 2048, 32, 8, 8192, 8192), 128256, 5e5, True,
             ROPE_SCALING="llama3:32,1,4,8192"),
        _hub("meta-llama/Llama-3.2-3B", (28, 3072, 24, 8, 8192, 8192), 128256, 5e5, True,
             ROPE_SCALING="llama3:32,1,4,8192"),
        _hub("meta-llama/Llama-3.1-8B", (32, 4096, 32, 8, 14336, 8192), 128256, 5e5, False,
             ROPE_SCALING="llama3:8,1,4,8192"),
        _hub("meta-llama/Llama-3.1-70B", (80, 8192, 64, 8, 28672, 8192), 128256, 5e5, False,
             ROPE_SCALING="llama3:8,1,4,8192"),
        _hub("Qwen/Qwen3-0.6B", (28, 1024, 16, 8, 3072, 8192), 151936, 1e6, True, **_QWEN3),
        _hub("Qwen/Qwen3-1.7B", (28, 2048, 16, 8, 6144, 8192), 151936, 1e6, True, **_QWEN3),
        _hub("Qwen/Qwen3-4B", (36, 2560, 32, 8, 9728, 8192), 151936, 1e6, True, **_QWEN3),
        _hub("Qwen/Qwen3-8B", (36, 4096, 32, 8, 12288, 8192), 151936, 1e6, False, **_QWEN3),
    ]),
    "gpt2": Preset("gpt2", ("openai-community/gpt2", "gpt2-124M"), _shape(
        12, 768, 12, 12, 3072, 1024, **_GPT2, VOCAB_SIZE=50257, TOKENIZER_TYPE="HFTokenizer",
        TOKENIZER_MODEL="openai-community/gpt2")),
    # GPT-2's blocks in the size of a first lesson: characters of one book, minutes on one GPU.
    "shakespeare": Preset("shakespeare", (), _shape(
        6, 384, 6, 6, 1536, 256, **_GPT2, LR=1e-3, MIN_LR=1e-4, MICRO_BATCH=64, GRAD_ACC_STEPS=1,
        TRAIN_ITERS=5000, EVAL_INTERVAL=250, SAVE_INTERVAL=1000)),
    # Learns the built-in corpus in a minute on two cores; fp32, because most CPUs emulate bf16.
    "debug": Preset("debug", (), _shape(
        4, 128, 4, 2, 352, 128, DTYPE="fp32", LR=3e-3, MIN_LR=3e-4, MICRO_BATCH=16,
        GRAD_ACC_STEPS=1, TRAIN_ITERS=200, EVAL_INTERVAL=100, EVAL_ITERS=5, SAVE_INTERVAL=100,
    )),
}
# fmt: on


ALIKE = {"SmolLM3-3B": "smollm3-3B", "Llama-3.2-3B": "llama3-3B"}
"""Models of the Hub that are easily taken for a shape of the launcher's: the same blocks, but the
Hub's are tied, with rotary settings and a vocabulary of their own."""


def find(name: str, variable: str = "MODEL_ARCH") -> str:
    """The key in `PRESETS` of any accepted spelling.

    Raises:
        ConfigError: for an unknown name, with the known ones, or one that may mean two.
    """
    names = {spelling: key for key, preset in PRESETS.items() for spelling in (key, *preset.also)}
    if name in names:
        return names[name]
    found = sorted({key for spelling, key in names.items() if spelling.lower() == name.lower()})
    if len(found) == 1:
        return found[0]
    if found:
        meant = " or ".join(f"{variable}={key} ({_described(key)})" for key in found)
        raise ConfigError(f"{variable}={name} may mean two models: set {meant}")
    near = [key for key in PRESETS if key.lower().endswith(f"-{name.lower()}")]
    size = re.search(r"\d+(\.\d+)?[bm]$", name.lower())
    if not near and size:  # llama-7b
        near = sorted({key for spelling, key in names.items() if _size(spelling) == size[0]})
    if not near:  # two models may differ in case alone
        close = difflib.get_close_matches(name.lower(), [s.lower() for s in names], n=1)
        near = sorted({key for spelling, key in names.items() if spelling.lower() in close})
    nearest = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{variable}={name} is not a known architecture.{nearest} Known: {', '.join(PRESETS)}. "
        "For another shape set NLAYERS, HIDDEN, HEADS, NUM_KV_HEAD, FFN_HIDDEN_SIZE and SEQ "
        "on top of one of them."
    )


def _size(spelling: str) -> str:
    """The last part of a name, such as 7b of AuroraGPT-7B."""
    return re.split(r"[-_]", spelling.lower())[-1]


def _described(key: str) -> str:
    """What tells a Hub's model and a shape of the launcher's apart."""
    values = PRESETS[key].values
    tied = "tied" if values.get("TIE_EMBEDDINGS") else "untied"
    nope = values.get("NOPE_INTERVAL")
    rotary = f"rotary but in every {nope}th layer" if nope else "rotary in every layer"
    vocabulary = values.get("VOCAB_SIZE", "the tokenizer's")
    kind = "the Hugging Face Hub's" if "VOCAB_SIZE" in values else "AuroraGPT's"
    return f"{kind}: {tied}, {rotary}, vocabulary {vocabulary}"


def alike_note(key: str) -> str | None:
    """Which of two models with nearly one name this is; None where no other is like it."""
    twins = ALIKE | {theirs: hub for hub, theirs in ALIKE.items()}
    if key not in twins:
        return None
    other = twins[key]
    return f"MODEL_ARCH={key} is {_described(key)}; {other} is {_described(other)}"

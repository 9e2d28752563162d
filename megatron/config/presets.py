"""MODEL_ARCH: named shapes with their defaults, keyed by the variables they stand in for.

Every value can be overridden by its variable or flag. Names are matched without regard to case.
"""

from __future__ import annotations

import difflib
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


def _shape(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, seq: int, **more: Value
) -> dict[str, Value]:
    """The six numbers of a shape under their variables' names."""
    return {
        "NLAYERS": layers,
        "HIDDEN": hidden,
        "HEADS": heads,
        "NUM_KV_HEAD": kv_heads,
        "FFN_HIDDEN_SIZE": ffn,
        "SEQ": seq,
        **more,
    }


def _hub(model: str, vocabulary: int, tied: bool, theta: float, **more: Value) -> dict[str, Value]:
    """What a model of the Hugging Face Hub fixes beside its shape."""
    return {
        "TIE_EMBEDDINGS": tied,
        "ROPE_THETA": theta,
        "VOCAB_SIZE": vocabulary,
        "TOKENIZER_TYPE": "HFTokenizer",
        "TOKENIZER_MODEL": model,
        **more,
    }


def _smollm2(size: str, theta: float) -> dict[str, Value]:
    return _hub(f"HuggingFaceTB/SmolLM2-{size}", 49152, True, theta)


def _llama3(model: str, tied: bool, scaling: str) -> dict[str, Value]:
    return _hub(f"meta-llama/{model}", 128256, tied, 500000.0, ROPE_SCALING=scaling)


def _qwen3(size: str, tied: bool) -> dict[str, Value]:
    return _hub(
        f"Qwen/Qwen3-{size}", 151936, tied, 1000000.0,
        ARCHITECTURE="qwen3", HEAD_DIM=128, RMS_NORM_EPS=1e-6,
    )  # fmt: skip


# Sources: the AuroraGPT launcher's shapes; config.json of each Hub model. The AuroraGPT, llama3-3B,
# smollm3-3B and phi4-mini shapes are untied, with rotary embeddings in every layer.
PRESETS: dict[str, Preset] = {
    "7B": Preset(
        "AuroraGPT-7B",
        ("AuroraGPT-7B", "aurora-gpt-7b", "llama-3.1-7B", "llama-3.2-7B"),
        _shape(32, 4096, 32, 8, 11008, 4096),
    ),
    "2B": Preset(
        "AuroraGPT-2B",
        ("AuroraGPT-2B", "AuroraGPT_2B", "AuroraGPT2B", "Aurora-GPT-2B", "Aurora_GPT_2B"),
        _shape(12, 2048, 16, 4, 11008, 8192),
    ),
    "llama3-3B": Preset(
        "llama3-3B-nLayers{layers}", ("llama-3B",), _shape(28, 3072, 24, 8, 8192, 8192)
    ),
    "smollm3-3B": Preset(
        "smollm3-nLayers{layers}", ("smollm3_3B",), _shape(36, 2048, 16, 4, 11008, 8192)
    ),
    "phi4-mini": Preset(
        "phi4-mini-nLayers{layers}", ("phi4_mini",), _shape(24, 3072, 32, 8, 8192, 8192)
    ),
    # 78 heads over 6 tensor-parallel ranks: the shape was chosen for TP=6.
    "33B": Preset(
        "AuroraGPT-33B",
        ("AuroraGPT-33B", "llama-3.2-33B"),
        _shape(
            78, 8268, 78, 6, 11076, 4096, TP=6, ZERO_STAGE=2, MICRO_BATCH=1, GRAD_ACC_STEPS=1
        ),
    ),
    "70B": Preset("AuroraGPT-70B", ("AuroraGPT-70B",), _shape(80, 8192, 64, 8, 28672, 8192)),
    "SmolLM2-135M": Preset(
        "SmolLM2-135M",
        ("HuggingFaceTB/SmolLM2-135M",),
        _shape(30, 576, 9, 3, 1536, 8192, **_smollm2("135M", 100000.0)),
    ),
    "SmolLM2-360M": Preset(
        "SmolLM2-360M",
        ("HuggingFaceTB/SmolLM2-360M",),
        _shape(32, 960, 15, 5, 2560, 8192, **_smollm2("360M", 100000.0)),
    ),
    "SmolLM2-1.7B": Preset(
        "SmolLM2-1.7B",
        ("HuggingFaceTB/SmolLM2-1.7B",),
        _shape(24, 2048, 32, 32, 8192, 8192, **_smollm2("1.7B", 130000.0)),
    ),
    "Llama-3.2-1B": Preset(
        "Llama-3.2-1B",
        ("meta-llama/Llama-3.2-1B",),
        _shape(16, 2048, 32, 8, 8192, 8192, **_llama3("Llama-3.2-1B", True, "llama3:32,1,4,8192")),
    ),
    "Llama-3.1-8B": Preset(
        "Llama-3.1-8B",
        ("meta-llama/Llama-3.1-8B",),
        _shape(32, 4096, 32, 8, 14336, 8192, **_llama3("Llama-3.1-8B", False, "llama3:8,1,4,8192")),
    ),
    "Qwen3-0.6B": Preset(
        "Qwen3-0.6B",
        ("Qwen/Qwen3-0.6B",),
        _shape(28, 1024, 16, 8, 3072, 8192, **_qwen3("0.6B", True)),
    ),
    "Qwen3-1.7B": Preset(
        "Qwen3-1.7B",
        ("Qwen/Qwen3-1.7B",),
        _shape(28, 2048, 16, 8, 6144, 8192, **_qwen3("1.7B", True)),
    ),
    "Qwen3-4B": Preset(
        "Qwen3-4B", ("Qwen/Qwen3-4B",), _shape(36, 2560, 32, 8, 9728, 8192, **_qwen3("4B", True))
    ),
    "Qwen3-8B": Preset(
        "Qwen3-8B", ("Qwen/Qwen3-8B",), _shape(36, 4096, 32, 8, 12288, 8192, **_qwen3("8B", False))
    ),
    # Learns the built-in corpus in a minute on two cores; fp32, because most CPUs emulate bf16.
    "debug": Preset(
        "debug",
        (),
        _shape(
            4, 128, 4, 2, 352, 128,
            DTYPE="fp32", LR=3e-3, MIN_LR=3e-4, MICRO_BATCH=16, GRAD_ACC_STEPS=1,
            TRAIN_ITERS=200, EVAL_INTERVAL=100, EVAL_ITERS=5, SAVE_INTERVAL=100,
        ),
    ),
}  # fmt: skip


def find(name: str, variable: str = "MODEL_ARCH") -> str:
    """The key in `PRESETS` of any accepted spelling.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    spellings = {
        spelling.lower(): key for key, preset in PRESETS.items() for spelling in (key, *preset.also)
    }
    key = spellings.get(name.lower())
    if key is None:
        close = difflib.get_close_matches(name.lower(), spellings, n=1)
        nearest = f" Did you mean {spellings[close[0]]}?" if close else ""
        raise ConfigError(
            f"{variable}={name} is not a known architecture.{nearest} Known: {', '.join(PRESETS)}. "
            "For another shape set NLAYERS, HIDDEN, HEADS, NUM_KV_HEAD, FFN_HIDDEN_SIZE and SEQ "
            "on top of one of them."
        )
    return key


def label(key: str, num_layers: int) -> str:
    """The name that logs and run names show, e.g. `llama3-3B-nLayers4`."""
    return PRESETS[key].label.format(layers=num_layers)

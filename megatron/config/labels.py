"""Labels that were printed, typed as MODEL_ARCH: `llama3-3B-nLayers14`, llama3-3B of 14 layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron.config import presets

ARCH = "model.model_arch"
LABELLED = "the label in MODEL_ARCH"
"""Source of a number that a label holds."""

# What a label's word stands for.
WORDS = {
    "nLayers": "model.num_layers",
    "hidden": "model.hidden_size",
    "heads": "model.num_attention_heads",
    "kv": "model.num_key_value_heads",
    "headDim": "model.head_dim",
    "ffn": "model.ffn_hidden_size",
    "nope": "model.nope_interval",
}
_WORD = rf"-({'|'.join(WORDS)})(\d+)"

Settings = list[tuple[str, str, str]]


def with_labels(settings: Sequence[tuple[str, str, str]]) -> Settings:
    """(key, text, name) settings, in which a label is divided into a preset and its numbers."""
    found: Settings = []
    for key, text, name in settings:
        label = re.fullmatch(rf"(.+?)((?:{_WORD})+)", text.strip()) if key == ARCH else None
        if label is None:
            found.append((key, text, name))
            continue
        found.append((ARCH, _preset(label[1]), name))
        found += [(WORDS[word], number, LABELLED) for word, number in re.findall(_WORD, label[2])]
    return found


def _preset(stem: str) -> str:
    """The preset whose label begins so: `smollm3-nLayers4` is one of smollm3-3B."""
    stems = {preset.label.partition("-nLayers")[0]: key for key, preset in presets.PRESETS.items()}
    return stems.get(stem, stem)

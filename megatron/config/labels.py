"""Labels: the name of a model in logs and run names, and a printed one typed as MODEL_ARCH."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron.config.presets import PRESETS, SHAPE, Value

ARCH = "model.model_arch"
LABELLED = "the label in MODEL_ARCH"
"""Source of a number that a label holds."""


class Part(NamedTuple):
    """What a label shows where it differs from the preset's.

    Attributes:
        key: of the option.
        word: before the value; empty: the value says enough.
        usual: of a preset that does not name it.
    """

    key: str
    word: str
    usual: Value = 0


PARTS = {
    "NLAYERS": Part("model.num_layers", "nLayers"),
    "HIDDEN": Part("model.hidden_size", "hidden"),
    "HEADS": Part("model.num_attention_heads", "heads"),
    "NUM_KV_HEAD": Part("model.num_key_value_heads", "kv"),
    "HEAD_DIM": Part("model.head_dim", "headDim"),
    "FFN_HIDDEN_SIZE": Part("model.ffn_hidden_size", "ffn"),
    "NOPE_INTERVAL": Part("model.nope_interval", "nope"),
    "TIE_EMBEDDINGS": Part("model.tie_embeddings", "", False),
    "ARCHITECTURE": Part("model.architecture", "", "llama"),
}
"""Variable, as presets name it -> its part of a label."""

_WORDS = {part.word: part.key for part in PARTS.values() if part.word}
_WORD = rf"-({'|'.join(_WORDS)})(\d+)"


def label(key: str, value: Callable[[str], Any]) -> str:
    """The name that logs and run names show, e.g. `llama3-3B-nLayers4`, `debug-nLayers8-kv4`.

    It is the preset's, with what differs from it; that of another AuroraGPT preset where all agrees
    with it (a 70B made of integers); and the family's, with all integers, where another width makes
    the size in the preset's name untrue.

    Args:
        key: of the preset.
        value: option key -> the model's value.
    """
    values = {name: value(part.key) for name, part in PARTS.items()}
    own = [key] + [name for name, preset in PRESETS.items() if "VOCAB_SIZE" not in preset.values]
    same = [name for name in own if not _differing(name, values)]
    base = PRESETS[same[0] if same else key]
    shown = base.label.format(layers=values["NLAYERS"])
    differing = {} if same else _differing(key, values)
    if "HIDDEN" in differing and re.search(r"\d[BM]\b|-mini\b", shown):
        shown = str(values["ARCHITECTURE"])
        differing = {name: values[name] for name in SHAPE[:-1]} | differing
        differing.pop("ARCHITECTURE", None)
    return "-".join([shown, *(_shown(name, value) for name, value in differing.items())])


def _differing(key: str, values: dict[str, Any]) -> dict[str, Any]:
    """What of `values` neither is the preset's nor stands in its label."""
    preset, told = PRESETS[key].values, "{layers}" in PRESETS[key].label
    return {
        name: values[name]
        for name, part in PARTS.items()
        if (values[name] or part.usual) != preset.get(name, part.usual)
        and not (told and name == "NLAYERS")
    }


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "tied" if value else "untied"
    return f"{PARTS[name].word}{value or 'Off'}"


def with_labels(settings: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """(key, text, name) settings, in which a label is divided into a preset and its numbers.

    `llama3-3B-nLayers14` is llama3-3B with 14 layers.
    """
    found = []
    for key, text, name in settings:
        typed = re.fullmatch(rf"(.+?)((?:{_WORD})+)", text.strip()) if key == ARCH else None
        if typed is None:
            found.append((key, text, name))
            continue
        found.append((ARCH, _preset(typed[1]), name))
        found += [(_WORDS[word], number, LABELLED) for word, number in re.findall(_WORD, typed[2])]
    return found


def _preset(stem: str) -> str:
    """The preset whose label begins so: `smollm3-nLayers4` is one of smollm3-3B."""
    stems = {preset.label.partition("-nLayers")[0]: key for key, preset in PRESETS.items()}
    return stems.get(stem, stem)

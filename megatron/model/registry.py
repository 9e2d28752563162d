"""Architectures by name (ARCHITECTURE): a new one is a file and a line here. Imports no torch."""

from __future__ import annotations

from megatron.model.architecture import Architecture
from megatron.model.gpt2 import GPT2
from megatron.model.llama import Llama
from megatron.model.olmo2 import Olmo2
from megatron.model.qwen3 import Qwen3

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2(),
    "llama": Llama(),
    "olmo2": Olmo2(),
    "qwen3": Qwen3(),
}


def architecture_of(hugging_face_class: str) -> str:
    """The name of the architecture that holds models of a class of transformers.

    Raises:
        ValueError: none does.
    """
    for name, architecture in ARCHITECTURES.items():
        if hugging_face_class in architecture.hugging_face:
            return name
    known = [theirs for kind in ARCHITECTURES.values() for theirs in kind.hugging_face]
    raise ValueError(f"architecture {hugging_face_class} is not supported; {', '.join(known)} are")

"""Architectures by name: a function that turns a shape into the list of layers."""

from __future__ import annotations

from collections.abc import Callable

from megatron.model.layer import Layer
from megatron.model.llama import llama_layers
from megatron.model.llama_config import LlamaConfig
from megatron.parallel.groups import Axis

# (shape, tensor-parallel axis, Ulysses' axis) -> layers
LayersFunction = Callable[[LlamaConfig, Axis, Axis], list[Layer]]

ARCHITECTURES: dict[str, LayersFunction] = {
    "llama": llama_layers,  # arXiv:2302.13971, 2307.09288, 2407.21783
    "smollm": llama_layers,  # arXiv:2502.02737 (tied embeddings); SmolLM3: a nope_interval of 4
}


def layers_function(architecture: str) -> LayersFunction:
    """The function of that name.

    Raises:
        ValueError: there is none.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture!r} is not one of {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[architecture]

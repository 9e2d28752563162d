"""Tiny shapes for tests, batches for them, and a stack's loss and gradients on this rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron.model.llama import LlamaConfig, llama_layers, loss_function
from megatron.model.rope import RopeScaling
from megatron.model.stack import Stack
from megatron.parallel.groups import SERIAL, Axis

TINY = LlamaConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    ffn_hidden_size=44,
    vocab_size=61,
    padded_vocab_size=128,
    rope_theta=10000.0,
    init_method_std=0.2,
)
"""Large weights: differences show, and attention is not uniform."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa2": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_embeddings": True, "num_key_value_heads": 2},
    "llama3-scaling": {"rope_theta": 500000.0, "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16)},
    "nope": {"nope_interval": 2, "num_key_value_heads": 2},
    "smollm3": {"nope_interval": 4, "tie_embeddings": True, "num_key_value_heads": 1},
}
"""Every feature of the shape at least once."""


def tiny(kind: str = "plain", **changes: Any) -> LlamaConfig:
    """TINY with the changes of a kind, and more changes."""
    return dataclasses.replace(TINY, **{**KINDS[kind], **changes})


def batch(config: LlamaConfig, size: int = 2, length: int = 24) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each (size, length), all over the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    sample = torch.randint(0, config.vocab_size, (size, length + 1), generator=generator)
    return sample[:, :-1], sample[:, 1:]


def build(
    config: LlamaConfig, tp: Axis = SERIAL, recompute_num_layers: int = 0, sp: Axis = SERIAL
) -> Stack:
    """The model of a configuration as one stage, with norms that are not all one."""
    model = Stack(llama_layers(config, tp, sp), recompute_num_layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name == f"{config.num_layers + 1}.weight":
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


def loss_and_gradients(
    config: LlamaConfig, model: Stack, tp: Axis = SERIAL
) -> tuple[float, dict[str, Tensor]]:
    """Loss of `batch(config)`, and this rank's gradient of every parameter."""
    tokens, labels = batch(config)
    loss = loss_function(config, tp)(model(tokens), labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients  # type: ignore[return-value]

"""Tiny shapes for tests, batches for them, and a stack's loss and gradients on this rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megatron.config.shape import ModelShape
from megatron.model.layer import Layer, ModelContext
from megatron.model.registry import ARCHITECTURES
from megatron.model.stack import Stack
from megatron.parallel.groups import SERIAL, Axis


@dataclass(frozen=True)
class Tiny(ModelShape):
    """A shape, with what a context adds beside the axes."""

    seed: int = 1234
    recompute: str = "none"
    sequence_parallel: bool = False
    attention_kernels: tuple[SDPBackend, ...] = ()
    expand_kv: bool = False

    def context(self, tp: Axis = SERIAL, sp: Axis = SERIAL) -> ModelContext:
        """The context on a rank."""
        added = ("seed", "recompute", "sequence_parallel", "attention_kernels", "expand_kv")
        return ModelContext(tp, sp, **{name: getattr(self, name) for name in added})


TINY = Tiny(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    ffn_hidden_size=44,
    vocab_size=61,
    rope_theta=10000.0,
    init_method_std=0.2,
)
"""Large weights: differences show, and attention is not uniform."""

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa2": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_embeddings": True, "num_key_value_heads": 2},
    "llama3-scaling": {"rope_theta": 500000.0, "rope_scaling": "llama3:8,1,4,16"},
    "nope": {"nope_interval": 2, "num_key_value_heads": 2},
    "smollm3": {"nope_interval": 4, "tie_embeddings": True, "num_key_value_heads": 1},
    "wide-heads": {"head_dim": 12, "num_key_value_heads": 2},
    "qwen3": {"architecture": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "olmo2": {"architecture": "olmo2", "num_key_value_heads": 2},
    "gpt2": {"architecture": "gpt2", "seq_length": 24, "tie_embeddings": True},
}
"""Every feature of the shape at least once."""


def tiny(kind: str = "plain", **changes: Any) -> Tiny:
    """TINY with the changes of a kind, and more changes."""
    return dataclasses.replace(TINY, **{**KINDS[kind], **changes})


def layers(config: Tiny, tp: Axis = SERIAL, sp: Axis = SERIAL) -> list[Layer]:
    """The list of layers on a rank."""
    return ARCHITECTURES[config.architecture].layers(config, config.context(tp, sp))


def batch(config: Tiny, size: int = 2, length: int = 24) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each (size, length), all over the vocabulary."""
    generator = torch.Generator().manual_seed(7)
    sample = torch.randint(0, config.vocab_size, (size, length + 1), generator=generator)
    return sample[:, :-1], sample[:, 1:]


def build(
    config: Tiny, tp: Axis = SERIAL, recompute_num_layers: int = 0, sp: Axis = SERIAL
) -> Stack:
    """The model of a configuration as one stage, with norms and biases that are not all alike."""
    model = Stack(layers(config, tp, sp), recompute_num_layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        bias = name.endswith("bias")
        if bias or name.endswith("norm.weight") or name == f"{config.num_layers + 1}.weight":
            low = -0.5 if bias else 0.5
            whole = torch.empty(parameter.full_shape).uniform_(low, low + 1, generator=generator)
            sharded = getattr(parameter, "partition_dim", None) == 0
            parameter.data.copy_(whole.chunk(tp.size)[tp.rank] if sharded else whole)
    return model


def loss_and_gradients(config: Tiny, model: Stack) -> tuple[float, dict[str, Tensor]]:
    """Loss of `batch(config)`, and this rank's gradient of every parameter."""
    tokens, labels = batch(config)
    loss = model(tokens, labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients  # type: ignore[return-value]

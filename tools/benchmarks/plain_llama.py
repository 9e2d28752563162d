"""Llama in plain torch, as one writes it for a notebook: what a framework's step is held against.

Legend: B batch, S sequence, H hidden, N heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.shape import ModelShape


class PlainLlama(nn.Module):
    """Untied or tied, rotary embeddings in every layer, no scaling of them.

    Args:
        shape: of the model.
        weights: by Hugging Face's names.
    """

    def __init__(self, shape: ModelShape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert shape.nope_interval == 0 and shape.rope_scaling is None
        self.shape = shape
        head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
        weights = weights if "lm_head.weight" in weights else {**weights, **head}
        self.table = nn.ParameterDict(
            {name.replace(".", "-"): nn.Parameter(weight) for name, weight in weights.items()}
        )
        width = shape.head_width
        rates = shape.rope_theta ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(shape.seq_length).float(), rates).repeat(1, 2)  # (S, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens and labels (B, S) int64 -> mean loss."""
        x = F.embedding(tokens, self._weight("model.embed_tokens"))  # (B, S, H)
        for number in range(self.shape.num_layers):
            layer = f"model.layers.{number}"
            x = x + self._attention(self._norm(x, f"{layer}.input_layernorm"), layer)
            y = self._norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (self._linear(y, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
        logits = self._linear(self._norm(x, "model.norm"), "lm_head")  # (B, S, V)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def _attention(self, x: Tensor, layer: str) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        q, k, v = (
            self._linear(x, f"{layer}.self_attn.{name}_proj")
            .unflatten(-1, (-1, self.shape.head_width))
            .transpose(1, 2)
            for name in "qkv"
        )  # (B, N or K, S, D)
        q, k = self._rotated(q), self._rotated(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self._linear(y.transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary embedding of (B, N, S, D)."""
        assert isinstance(self.cos, Tensor) and isinstance(self.sin, Tensor)
        one, two = x.chunk(2, dim=-1)
        return x * self.cos.to(x.dtype) + torch.cat((-two, one), dim=-1) * self.sin.to(x.dtype)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weight(name)
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weight(name))

    def _weight(self, name: str) -> Tensor:
        return self.table[f"{name}.weight".replace(".", "-")]

"""Qwen3, dense (arXiv:2505.09388): Llama with RMSNorm on each head of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from megatron.model.architecture import Architecture
from megatron.model.llama import Llama

if TYPE_CHECKING:
    from megatron.config.shape import ModelShape
    from megatron.model.layer import Layer, ModelContext


class Qwen3(Architecture):
    """Llama's blocks, a norm over the head dimension before the rotary embedding."""

    hugging_face: ClassVar = {"Qwen3ForCausalLM": "qwen3"}
    block_names: ClassVar = {
        **Llama.block_names,
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
    }
    fixed: ClassVar = {"nope_interval": 0}
    hugging_face_defaults: ClassVar = {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    }

    def layers(self, shape: ModelShape, context: ModelContext) -> list[Layer]:
        """Embedding, blocks, final norm, head."""
        from megatron.model.block import decoder_layers
        from megatron.model.norm import RMSNorm

        def qk_norm(heads: int) -> RMSNorm:
            del heads  # one weight for all of them, and each tensor-parallel rank has some heads
            return RMSNorm(shape.head_width, shape.rms_norm_eps, context.tp)

        return decoder_layers(shape, context, qk_norm=qk_norm)

    def layer_parameters(self, shape: ModelShape) -> int:
        """Also the weights of the two norms."""
        return super().layer_parameters(shape) + 2 * shape.head_width

    def hugging_face_config(self, shape: ModelShape) -> dict[str, Any]:
        """Always with head_dim, which transformers takes to be 128 where it is missing."""
        return super().hugging_face_config(shape) | {"head_dim": shape.head_width}

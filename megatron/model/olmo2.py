"""OLMo 2 (arXiv:2501.00656): norms after attention and MLP, RMSNorm over all heads of q and k."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from megatron.model.architecture import Architecture
from megatron.model.llama import Llama

if TYPE_CHECKING:
    from megatron.config.shape import ModelShape
    from megatron.model.layer import Layer, ModelContext


class Olmo2(Architecture):
    """Post-norm blocks with a norm over the whole width of q and k."""

    hugging_face: ClassVar = {"Olmo2ForCausalLM": "olmo2"}
    block_names: ClassVar = {
        **{ours: name for ours, name in Llama.block_names.items() if ours != "input_norm.weight"},
        "attention.q_norm.weight": "self_attn.q_norm.weight",
        "attention.k_norm.weight": "self_attn.k_norm.weight",
        "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
    }
    fixed: ClassVar = {"nope_interval": 0}
    hugging_face_defaults: ClassVar = {"rms_norm_eps": 1e-5}

    def layers(self, shape: ModelShape, context: ModelContext) -> list[Layer]:
        """Embedding, blocks, final norm, head."""
        from megatron.model.all_heads_norm import AllHeadsRMSNorm
        from megatron.model.block import PostNormBlock, decoder_layers

        qk_norm = partial(
            AllHeadsRMSNorm, width=shape.head_width, eps=shape.rms_norm_eps, tp=context.tp
        )
        return decoder_layers(shape, context, PostNormBlock, qk_norm)

    def layer_parameters(self, shape: ModelShape) -> int:
        """Also the weights of the norms of queries and keys."""
        return super().layer_parameters(shape) + shape.query_size + shape.key_value_size

"""Llama 2 and 3 (arXiv:2307.09288, 2407.21783), SmolLM2 (arXiv:2502.02737) and SmolLM3.

SmolLM2 is Llama with tied embeddings; SmolLM3 has no rotary embedding in every fourth block
(nope_interval 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.model.architecture import Architecture, given

if TYPE_CHECKING:
    from megatron.config.shape import ModelShape
    from megatron.model.layer import Layer, ModelContext

LLAMA, SMOLLM3 = "LlamaForCausalLM", "SmolLM3ForCausalLM"
_SMOLLM3_DEFAULTS = {
    "max_position_embeddings": 32768,
    "no_rope_layer_interval": 4,
    "num_key_value_heads": 4,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}


class Llama(Architecture):
    """Norms before attention and MLP."""

    hugging_face: ClassVar = {LLAMA: "llama", SMOLLM3: "smollm3"}
    block_names: ClassVar = {
        "input_norm.weight": "input_layernorm.weight",
        "attention.q.weight": "self_attn.q_proj.weight",
        "attention.k.weight": "self_attn.k_proj.weight",
        "attention.v.weight": "self_attn.v_proj.weight",
        "attention.o.weight": "self_attn.o_proj.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "mlp.gate.weight": "mlp.gate_proj.weight",
        "mlp.up.weight": "mlp.up_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    }

    def layers(self, shape: ModelShape, context: ModelContext) -> list[Layer]:
        """Embedding, blocks, final norm, head."""
        from megatron.model.block import decoder_layers

        return decoder_layers(shape, context)

    def hugging_face_class(self, shape: ModelShape) -> str:
        """SmolLM3's where blocks lack the rotary embedding."""
        return SMOLLM3 if shape.nope_interval else LLAMA

    def hugging_face_config(self, shape: ModelShape) -> dict[str, Any]:
        """Also which blocks have the rotary embedding."""
        config = super().hugging_face_config(shape)
        if not shape.nope_interval:
            return config
        rotary = [int(shape.has_rope(block)) for block in range(shape.num_layers)]
        return config | {"no_rope_layer_interval": shape.nope_interval, "no_rope_layers": rotary}

    def shape_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Also which blocks have the rotary embedding."""
        if config["architectures"][0] == LLAMA:
            return super().shape_fields(config)
        config = {**_SMOLLM3_DEFAULTS, **given(config)}
        interval = int(config["no_rope_layer_interval"])
        layers, rotary = config["num_hidden_layers"], config.get("no_rope_layers")
        expected = [int((layer + 1) % interval != 0) for layer in range(layers)]
        if rotary is not None and list(rotary[:layers]) != expected:
            raise ValueError(f"no_rope_layers {rotary} is not every {interval}th layer")
        return super().shape_fields(config) | {"nope_interval": interval}

"""GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions, a bias in each linear layer.

Without its dropout, as models are pretrained today.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.model.architecture import Architecture, given

if TYPE_CHECKING:
    from megatron.config.shape import ModelShape
    from megatron.model.layer import Layer, ModelContext

_PARTS = {
    "input_norm": "ln_1", "attention.q": "attn.c_attn", "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn", "attention.o": "attn.c_proj", "post_attention_norm": "ln_2",
    "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip
_GELU = ("gelu_new", "gelu_pytorch_tanh")  # one function


class GPT2(Architecture):
    """Norms before attention and MLP, positions added once, before the first block."""

    hugging_face: ClassVar = {"GPT2LMHeadModel": "gpt2"}
    hugging_face_prefix: ClassVar = "transformer."
    length_entry: ClassVar = "n_positions"
    vocabulary_names: ClassVar = ("transformer.wte.weight", "lm_head.weight")
    block_names: ClassVar = {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in _PARTS.items()
        for kind in ("weight", "bias")
    }
    fixed: ClassVar = {"nope_interval": 0, "rope_scaling": None}
    mlp_matrices: ClassVar = 2
    learned_positions: ClassVar = True

    def layers(self, shape: ModelShape, context: ModelContext) -> list[Layer]:
        """Embedding, blocks, final norm, head."""
        from megatron.model.gpt2_blocks import gpt2_layers

        return gpt2_layers(shape, context)

    def layer_parameters(self, shape: ModelShape) -> int:
        """Matrices, and a bias for each output of them: q, k, v, o, up and down; two norms."""
        h, q, d, f = (
            shape.hidden_size, shape.query_size, shape.key_value_size, shape.ffn_hidden_size,
        )  # fmt: skip
        return self.block_matrices(shape) + (q + 2 * d + h) + (f + h) + 2 * 2 * h

    def first_parameters(self, shape: ModelShape) -> int:
        """The table of positions."""
        return shape.seq_length * shape.hidden_size

    def norm_parameters(self, shape: ModelShape) -> int:
        """A weight and a bias."""
        return 2 * shape.hidden_size

    def hugging_face_names(self, shape: ModelShape) -> dict[str, str]:
        """Q, k and v of a block stand together in one matrix of theirs."""
        tied, last = shape.tie_embeddings, shape.num_layers + 1
        names = {
            "tied_modules.embedding.weight" if tied else "0.weight": "transformer.wte.weight",
            "1.positions.weight": "transformer.wpe.weight",
        }
        for layer in range(shape.num_layers):
            for ours, theirs in self.block_names.items():
                names[f"{layer + 1}.{ours}"] = f"transformer.h.{layer}.{theirs}"
        for kind in ("weight", "bias"):
            names[f"{last}.{kind}"] = f"transformer.ln_f.{kind}"
        return names if tied else names | {f"{last + 1}.weight": "lm_head.weight"}

    def is_transposed(self, theirs: str) -> bool:
        """Its blocks' matrices are (inputs, outputs)."""
        return ".c_" in theirs and theirs.endswith(".weight")

    def is_left_over(self, theirs: str) -> bool:
        """Older files hold the causal mask, and its value for hidden scores."""
        return theirs.endswith((".attn.bias", ".attn.masked_bias"))

    def hugging_face_config(self, shape: ModelShape) -> dict[str, Any]:
        """Entries of config.json."""
        (name,) = self.hugging_face
        return {
            "architectures": [name],
            "model_type": self.hugging_face[name],
            "vocab_size": shape.vocab_size,
            "n_positions": shape.seq_length,
            "n_embd": shape.hidden_size,
            "n_layer": shape.num_layers,
            "n_head": shape.num_attention_heads,
            "n_inner": shape.ffn_hidden_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": shape.rms_norm_eps,
            "tie_word_embeddings": shape.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }

    def shape_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelShape` that a config.json gives.

        Raises:
            ValueError: the model has parts that this framework does not compute.
        """
        config = {**_DEFAULTS, **given(config)}
        problems = self.not_computed(config)
        if problems:
            raise ValueError("not computed by this framework: " + "; ".join(problems))
        return {
            "num_layers": config["n_layer"],
            "hidden_size": config["n_embd"],
            "num_attention_heads": config["n_head"],
            "num_key_value_heads": config["n_head"],
            "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
            "vocab_size": config["vocab_size"],
            "seq_length": config["n_positions"],
            "tie_embeddings": bool(config["tie_word_embeddings"]),
            "rms_norm_eps": config["layer_norm_epsilon"],
        }

    def not_computed(self, config: Mapping[str, Any]) -> list[str]:
        """Entries of a config.json that change the model in ways this framework lacks."""
        usual: dict[str, tuple[Any, ...]] = {
            "activation_function": _GELU,
            "scale_attn_weights": (None, True),
            "scale_attn_by_inverse_layer_idx": (None, False),
            "add_cross_attention": (None, False),
            "quantization_config": (None,),
        }
        return [
            f"{name}={config[name]} ({' or '.join(str(value) for value in values if value)} only)"
            for name, values in usual.items()
            if config.get(name) not in values
        ]

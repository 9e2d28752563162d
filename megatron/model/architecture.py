"""A model family: its layers, parameter count, FLOPs and Hugging Face form. Imports no torch.

`Architecture` is what decoder-only transformers with grouped-query attention, a SwiGLU MLP and no
biases share. A family is a subclass in a file of its own that states the differences.
Symbols: L layers, h hidden, q and d widths of queries and keys, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from megatron.config.shape import ModelShape
    from megatron.model.layer import Layer, ModelContext


class Architecture:
    """A family of models.

    Attributes:
        hugging_face: classes of transformers that hold such a model, each with its model_type.
        block_names: a block's parameters, our name -> theirs.
        fixed: fields of `ModelShape` with one possible value in the family, and that value.
        hugging_face_defaults: entries that transformers has these values for where config.json
            leaves them out.
        hugging_face_prefix: of their names, which files of a bare model lack.
        length_entry: of config.json, the longest sequence.
        vocabulary_names: theirs of the matrices with one row per token, the embedding first.
        mlp_matrices: of a block, each HIDDEN x FFN_HIDDEN_SIZE.
        learned_positions: positions are a table of SEQ rows, and there is no rotary embedding.
    """

    hugging_face: ClassVar[Mapping[str, str]]
    block_names: ClassVar[Mapping[str, str]]
    fixed: ClassVar[Mapping[str, Any]] = {}
    hugging_face_defaults: ClassVar[Mapping[str, Any]] = {}
    hugging_face_prefix: ClassVar[str] = "model."
    length_entry: ClassVar[str] = "max_position_embeddings"
    vocabulary_names: ClassVar[tuple[str, ...]] = ("model.embed_tokens.weight", "lm_head.weight")
    mlp_matrices: ClassVar[int] = 3
    learned_positions: ClassVar[bool] = False

    def layers(self, shape: ModelShape, context: ModelContext) -> list[Layer]:
        """The model: tokens (B, S) int64 in, this rank's logits (B, S, V/tp) out."""
        raise NotImplementedError

    # Counts

    def block_matrices(self, shape: ModelShape) -> int:
        """Weights of one block's matrices: q and o, k and v, and those of the MLP."""
        h, q, d = shape.hidden_size, shape.query_size, shape.key_value_size
        return 2 * h * q + 2 * h * d + self.mlp_matrices * h * shape.ffn_hidden_size

    def layer_parameters(self, shape: ModelShape) -> int:
        """Parameters of one block: its matrices and two norms."""
        return self.block_matrices(shape) + 2 * shape.hidden_size

    def first_parameters(self, shape: ModelShape) -> int:
        """Parameters beside the first block: none."""
        del shape
        return 0

    def norm_parameters(self, shape: ModelShape) -> int:
        """Parameters of a norm of the residual stream: its weight."""
        return shape.hidden_size

    def parameters(self, shape: ModelShape, tensor_parallel: int = 1) -> int:
        """Parameters of the whole model: L blocks, embedding, head (unless tied), final norm."""
        tables = 1 if shape.tie_embeddings else 2
        vocabulary = tables * shape.padded_vocab_size(tensor_parallel) * shape.hidden_size
        ends = self.first_parameters(shape) + self.norm_parameters(shape)
        return vocabulary + shape.num_layers * self.layer_parameters(shape) + ends

    def block_flops(self, shape: ModelShape) -> int:
        """FLOPs per token of one block's forward pass, full attention."""
        return 2 * self.block_matrices(shape) + 4 * shape.query_size * shape.seq_length

    def head_flops(self, shape: ModelShape, tensor_parallel: int = 1) -> int:
        """FLOPs per token of the head's forward pass: a product with a (V, h) matrix."""
        return 2 * shape.padded_vocab_size(tensor_parallel) * shape.hidden_size

    def flops_per_token_lm(self, shape: ModelShape, tensor_parallel: int = 1) -> int:
        """Forward and backward by Megatron-LM's count: full attention, no recomputation."""
        blocks = shape.num_layers * self.block_flops(shape)
        return 3 * (blocks + self.head_flops(shape, tensor_parallel))

    def flops_per_token_causal(self, shape: ModelShape, tensor_parallel: int = 1) -> int:
        """As `flops_per_token_lm`, with half of the attention, as the causal mask leaves."""
        attention = 12 * shape.num_layers * shape.query_size * shape.seq_length
        return self.flops_per_token_lm(shape, tensor_parallel) - attention // 2

    def flops_per_token_ds(
        self, shape: ModelShape, activation_checkpointing: str = "0", tensor_parallel: int = 1
    ) -> int:
        """DeepSpeed's throughput formula, which counts the recomputed forward pass.

        Its integer division drops the keys and values of models with more than two queries per
        key; kept, because published tables were made with it.

        Args:
            shape: of the model.
            activation_checkpointing: "0" none, "1" layers (a fourth pass), "selective" attention.
            tensor_parallel: ranks that the padding of the vocabulary depends on.
        """
        h, q = shape.hidden_size, shape.query_size
        queries_per_key = shape.num_attention_heads // shape.num_key_value_heads
        projections = (1 + 2 // queries_per_key + 1) * h * q
        projections += self.mlp_matrices * shape.ffn_hidden_size * h
        attention = 2 * q * shape.seq_length
        vocabulary = shape.padded_vocab_size(tensor_parallel) * h
        forward = shape.num_layers * (projections + attention) + vocabulary
        passes = 4 if activation_checkpointing == "1" else 3
        recomputed = shape.num_layers * attention if activation_checkpointing == "selective" else 0
        return 2 * (passes * forward + recomputed)

    # Hugging Face

    def hugging_face_names(self, shape: ModelShape) -> dict[str, str]:
        """Our parameter name -> theirs, in the order of the layers.

        Several of ours with one of theirs are stacked in it along the outputs, in this order.
        """
        tied, last = shape.tie_embeddings, shape.num_layers + 1
        embedding = "tied_modules.embedding.weight" if tied else "0.weight"
        names = {embedding: "model.embed_tokens.weight"}
        for layer in range(shape.num_layers):
            for ours, theirs in self.block_names.items():
                names[f"{layer + 1}.{ours}"] = f"model.layers.{layer}.{theirs}"
        names[f"{last}.weight"] = "model.norm.weight"
        return names if tied else names | {f"{last + 1}.weight": "lm_head.weight"}

    def is_vocabulary(self, theirs: str) -> bool:
        """Whether a Hugging Face name is a matrix with one row per token."""
        return theirs in self.vocabulary_names

    def is_transposed(self, theirs: str) -> bool:
        """Whether a matrix is (inputs, outputs) in their files, where ours is the other way."""
        del theirs
        return False

    def is_left_over(self, theirs: str) -> bool:
        """Whether a tensor of older files is no weight: it follows from config.json."""
        return theirs.endswith("rotary_emb.inv_freq")

    def hugging_face_class(self, shape: ModelShape) -> str:
        """The class that holds a model of this shape."""
        del shape
        return next(iter(self.hugging_face))

    def hugging_face_config(self, shape: ModelShape) -> dict[str, Any]:
        """Entries of config.json; rotary settings in both the current and the older spelling."""
        name = self.hugging_face_class(shape)
        factors = shape.rope_scaling_factors
        scaling = (
            None
            if factors is None
            else {
                "rope_type": "llama3",
                "factor": factors.factor,
                "low_freq_factor": factors.low_freq_factor,
                "high_freq_factor": factors.high_freq_factor,
                "original_max_position_embeddings": factors.original_length,
            }
        )
        config = {
            "architectures": [name],
            "model_type": self.hugging_face[name],
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "max_position_embeddings": shape.seq_length,
            "hidden_act": "silu",
            "rms_norm_eps": shape.rms_norm_eps,
            "tie_word_embeddings": shape.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": shape.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                "rope_theta": shape.rope_theta,
                **(scaling or {"rope_type": "default"}),
            },
        }
        follows = shape.query_size == shape.hidden_size
        return config if follows else config | {"head_dim": shape.head_width}

    def shape_fields(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelShape` that a config.json gives.

        Raises:
            ValueError: the model has parts that this framework does not compute, or an entry that
                has no default is missing.
        """
        config = {**_DEFAULTS, **self.hugging_face_defaults, **given(config)}
        problems = self.not_computed(config)
        if problems:
            raise ValueError("not computed by this framework: " + "; ".join(problems))
        missing = [name for name in _REQUIRED if config.get(name) is None]
        if missing:
            raise ValueError(f"has no {', '.join(missing)}")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        rope = _rope(config)
        head_dim = config.get("head_dim")
        return {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads") or heads,
            "ffn_hidden_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "seq_length": config["max_position_embeddings"],
            "head_dim": None if head_dim == hidden / heads else head_dim,
            "tie_embeddings": bool(config["tie_word_embeddings"]),
            "rope_theta": float(rope.get("rope_theta") or config["rope_theta"]),
            "rope_scaling": _scaling_text(rope),
            "rms_norm_eps": config["rms_norm_eps"],
        }

    def not_computed(self, config: Mapping[str, Any]) -> list[str]:
        """Entries of a config.json that change the model in ways this framework lacks.

        Each is `entry=value (what there is)`, as the file spells it.
        """
        rope = _rope(config)
        kind = rope.get("rope_type", rope.get("type", "default"))
        rotary = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        windows = set(config.get("layer_types") or ()) - {"full_attention"}
        refused = {
            "hidden_act": (config["hidden_act"] not in ("silu", "swish"), "silu only"),
            "attention_bias": (bool(config.get("attention_bias")), "no biases"),
            "mlp_bias": (bool(config.get("mlp_bias")), "no biases"),
            "use_sliding_window": (bool(config.get("use_sliding_window")), "no sliding windows"),
            "layer_types": (bool(windows), f"no {', '.join(sorted(windows))}"),
            "rope_type": (kind not in ("default", "llama3"), "default and llama3 only"),
            "partial_rotary_factor": (rotary not in (None, 1), "1 only"),
            "quantization_config": (bool(config.get("quantization_config")), "plain weights only"),
        }
        values = {**config, "rope_type": kind, "partial_rotary_factor": rotary}
        return [f"{name}={values[name]} ({have})" for name, (bad, have) in refused.items() if bad]


_REQUIRED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""What transformers takes where config.json says nothing; `hugging_face_defaults` differ."""


def given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that say something: null is a value of few."""
    return {
        name: value
        for name, value in config.items()
        if value is not None or name == "num_key_value_heads"  # null: as many as query heads
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings, in the present spelling or the older one."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _scaling_text(rope: Mapping[str, Any]) -> str | None:
    """ROPE_SCALING of the rotary settings of a config.json."""
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    try:
        return (
            f"llama3:{rope['factor']:g},{rope['low_freq_factor']:g},{rope['high_freq_factor']:g},"
            f"{rope['original_max_position_embeddings']}"
        )
    except KeyError as error:
        raise ValueError(f"its llama3 rope scaling has no {error.args[0]}") from None

"""The shape of a model: the only type for its integers, and the configuration's section `model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.option import option
from megatron.config.rope_scaling import Llama3Scaling, parse
from megatron.model.registry import ARCHITECTURES


@dataclass(frozen=True)
class ModelShape:
    """Shape of a transformer (Hugging Face's Llama conventions)."""

    model_arch: str = option(None, "MODEL_ARCH", "--model-arch", "preset of the model's shape; 7B on a known HPC machine, debug elsewhere")
    architecture: str = option("llama", "ARCHITECTURE", "--architecture", "family of the model; default the preset's", ARCHITECTURES)
    num_layers: int = option(None, "NLAYERS NUM_LAYERS", "--num-layers", "transformer layers", least=1)
    hidden_size: int = option(None, "HIDDEN", "--hidden-size", "width of the residual stream", least=1)
    num_attention_heads: int = option(None, "HEADS NHEADS", "--num-attention-heads", "query heads", least=1)
    num_key_value_heads: int = option(None, "NUM_KV_HEAD", "--num-key-value-heads", "key/value heads (grouped-query attention)", least=1)
    head_dim: int | None = option(None, "HEAD_DIM", "--head-dim", "width of an attention head; unset: HIDDEN / HEADS", least=1)
    ffn_hidden_size: int = option(None, "FFN_HIDDEN_SIZE", "--ffn-hidden-size", "width of the MLP (SwiGLU; gpt2: GELU)", least=1)
    seq_length: int = option(None, "SEQ SEQ_LEN SEQ_LENGTH", "--seq-length", "tokens in a training sample", least=1)
    tie_embeddings: bool = option(False, "TIE_EMBEDDINGS", "--tie-embeddings", "one matrix for input embedding and output head")
    nope_interval: int = option(0, "NOPE_INTERVAL", "--nope-interval", "every n-th layer has no rotary embedding (SmolLM3: 4); 0: rotary everywhere")
    rope_theta: float = option(50000.0, "ROPE_THETA", "--rope-theta --rotary-position-embeddings-theta", "base of the rotary frequencies", above=0)
    rope_scaling: str | None = option(None, "ROPE_SCALING", "--rope-scaling", "`llama3` or `llama3:factor,low,high,original_length`; unset: none")
    rms_norm_eps: float = option(1e-5, "RMS_NORM_EPS", "--layernorm-epsilon --rms-norm-eps", "epsilon of RMSNorm and LayerNorm", above=0)
    init_method_std: float = option(None, "", "--init-method-std", "standard deviation of the initial weights; default sqrt(2 / (5 HIDDEN))", above=0)
    word_embedding_init_std: float | None = option(None, "WORD_EMBEDDING_INIT_STD", "--word-embedding-init-std", "standard deviation of the initial token embedding; unset: that of the other weights", above=0)
    vocab_size: int = option(None, "VOCAB_SIZE", "--vocab-size", "vocabulary before padding; default: the tokenizer's", least=1)

    @property
    def head_width(self) -> int:
        """Width of an attention head: head_dim, or hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_size(self) -> int:
        """Width of the queries, and of the attention's output, of one layer."""
        return self.num_attention_heads * self.head_width

    @property
    def key_value_size(self) -> int:
        """Width of the keys, and of the values, of one layer."""
        return self.num_key_value_heads * self.head_width

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial matrices."""
        return self.init_method_std or math.sqrt(2 / (5 * self.hidden_size))

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the initial token embedding."""
        return self.word_embedding_init_std or self.weight_std

    @property
    def residual_std(self) -> float:
        """Initial deviation of the 2 num_layers matrices that write into the residual stream."""
        return self.weight_std / math.sqrt(2 * self.num_layers)

    @property
    def rope_scaling_factors(self) -> Llama3Scaling | None:
        """Factors of the llama3 frequency scaling; None: no scaling."""
        return parse(self.rope_scaling) if self.rope_scaling else None

    def has_rope(self, block: int) -> bool:
        """Whether block `block` (0-based) has the rotary embedding."""
        return self.nope_interval == 0 or (block + 1) % self.nope_interval != 0

    def padded_vocab_size(self, tensor_parallel: int = 1) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 128 x TP."""
        multiple = 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple

    def identity(self) -> dict[str, Any]:
        """What must not change for weights to fit and mean the same; in a checkpoint's manifest.

        `ModelShape(**identity)` is the shape without its sequence length, which only learned
        positions bind; fields that an older checkpoint lacks have their defaults.
        """
        learned = ARCHITECTURES[self.architecture].learned_positions
        names = (*IDENTITY, "seq_length") if learned else IDENTITY
        return {name: getattr(self, name) for name in names} | {"head_dim": self.head_width}

    def changes_since(self, stored: Mapping[str, Any]) -> list[str]:
        """`field before -> now` of each difference from an `identity()` that was stored."""
        before = ModelShape(**stored).identity()  # an older one lacks fields that have defaults
        return [
            f"{name} {before[name]} -> {value}"
            for name, value in self.identity().items()
            if before[name] != value
        ]


IDENTITY = (
    "num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "ffn_hidden_size",
    "vocab_size", "tie_embeddings", "nope_interval", "rope_theta", "rope_scaling", "rms_norm_eps",
    "architecture", "head_dim",
)  # fmt: skip
"""Fields that a resume must not change."""

"""The shape of a Llama or SmolLM model, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.model.recompute import RECOMPUTE
from megatron.model.rope import RopeScaling


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's Llama conventions.

    Attributes:
        num_layers: transformer blocks.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads, each hidden_size / num_attention_heads wide.
        num_key_value_heads: key and value heads; query heads share them in equal groups.
        ffn_hidden_size: width of the SwiGLU MLP.
        vocab_size: tokens of the tokenizer.
        padded_vocab_size: rows of the embedding and of the head; those beyond vocab_size stay zero.
        tie_embeddings: one matrix for input embedding and head.
        nope_interval: every n-th block has no rotary embedding; 0: all have it.
        rope_theta: base of the rotary frequencies.
        rope_scaling: stretching of the rotary frequencies as in Llama 3.1; None: none.
        rms_norm_eps: epsilon of the norms.
        init_method_std: standard deviation of the initial weights; None: sqrt(2 / (5 hidden_size)).
        seed: of the initial weights.
        no_flash_attention: attention by plain matrix products.
        recompute: what the backward pass computes again: "none", "selective" (all but matrix
            products) or "full" (blocks).
        sequence_parallel: Megatron's: the residual stream is cut along the sequence over the
            tensor-parallel ranks.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    tie_embeddings: bool = False
    nope_interval: int = 0
    rope_theta: float = 50000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    init_method_std: float | None = None
    seed: int = 1234
    no_flash_attention: bool = False
    recompute: str = "none"
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"HIDDEN / HEADS = {self.hidden_size} / {self.num_attention_heads}: "
                f"must be an even whole number"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"HEADS={self.num_attention_heads} is not a multiple of "
                f"NUM_KV_HEAD={self.num_key_value_heads}"
            )
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded vocabulary {self.padded_vocab_size} < VOCAB_SIZE={self.vocab_size}"
            )
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute={self.recompute!r} is not one of {', '.join(RECOMPUTE)}")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def weight_std(self) -> float:
        """Standard deviation of the matrices and embeddings."""
        if self.init_method_std is None:
            return math.sqrt(2 / (5 * self.hidden_size))
        return self.init_method_std

    @property
    def residual_std(self) -> float:
        """Of the 2 num_layers matrices that write into the residual stream."""
        return self.weight_std / math.sqrt(2 * self.num_layers)

    def has_rope(self, block: int) -> bool:
        """Whether block `block` (0-based) has the rotary embedding."""
        return self.nope_interval == 0 or (block + 1) % self.nope_interval != 0

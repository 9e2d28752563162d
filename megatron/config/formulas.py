"""Parameters and FLOPs of a Llama-shaped model: pure integers of plain integers.

Symbols: L layers, h hidden, a heads, k key/value heads, d = k * (h / a) width of the keys, f MLP
width, s sequence, V padded vocabulary.
"""

from __future__ import annotations

from megatron.config.shape import ModelShape


def layer_parameters(shape: ModelShape) -> int:
    """Parameters of one block: q and o, k and v, gate, up and down, two norms."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.key_value_size
    return 2 * h * h + 2 * h * d + 3 * h * f + 2 * h


def parameters(shape: ModelShape, tensor_parallel: int = 1) -> int:
    """Parameters of the whole model: L blocks, embedding, head (unless tied), final norm."""
    tables = 1 if shape.tie_embeddings else 2
    vocabulary = tables * shape.padded_vocab_size(tensor_parallel) * shape.hidden_size
    return vocabulary + shape.num_layers * layer_parameters(shape) + shape.hidden_size


def flops_per_token_lm(shape: ModelShape, tensor_parallel: int = 1) -> int:
    """Model FLOPs of forward and backward by Megatron-LM's count: full attention, no recompute."""
    return _matrix_flops(shape, tensor_parallel) + _attention_flops(shape)


def flops_per_token_causal(shape: ModelShape, tensor_parallel: int = 1) -> int:
    """As `flops_per_token_lm` with the half of the attention that a causal mask leaves."""
    return _matrix_flops(shape, tensor_parallel) + _attention_flops(shape) // 2


def flops_per_token_ds(
    shape: ModelShape, activation_checkpointing: str = "0", tensor_parallel: int = 1
) -> int:
    """FLOPs by DeepSpeed's throughput formula, whose recomputed forward pass counts.

    Its integer division drops the keys and values of models with more than two queries a key;
    kept, because published tables were made with it.

    Args:
        activation_checkpointing: "0" none, "1" layers (a fourth pass), "selective" attention.
    """
    length, h, s = shape.num_layers, shape.hidden_size, shape.seq_length
    queries_per_key = shape.num_attention_heads // shape.num_key_value_heads
    projections = (1 + 2 // queries_per_key + 1) * h * h + 3 * shape.ffn_hidden_size * h
    attention = 2 * h * s
    forward = length * (projections + attention) + shape.padded_vocab_size(tensor_parallel) * h
    passes = 4 if activation_checkpointing == "1" else 3
    recomputed = length * attention if activation_checkpointing == "selective" else 0
    return 2 * (passes * forward + recomputed)


def block_flops(shape: ModelShape) -> int:
    """FLOPs a token of one block's forward pass, full attention."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.key_value_size
    return 2 * (2 * h * h + 2 * h * d + 3 * h * f) + 4 * h * shape.seq_length


def head_flops(shape: ModelShape, tensor_parallel: int = 1) -> int:
    """FLOPs a token of the head's forward pass: one multiplication with a (V, h) matrix."""
    return 2 * shape.padded_vocab_size(tensor_parallel) * shape.hidden_size


def _matrix_flops(shape: ModelShape, tensor_parallel: int = 1) -> int:
    """6 FLOPs a token for each weight of a matrix; the head is one, the embedding is not."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.key_value_size
    per_layer = 2 * h * h + 2 * h * d + 3 * h * f
    return 6 * (shape.num_layers * per_layer + shape.padded_vocab_size(tensor_parallel) * h)


def _attention_flops(shape: ModelShape) -> int:
    """Scores and weighted values of every token with all s tokens, forward and backward."""
    return 12 * shape.num_layers * shape.hidden_size * shape.seq_length

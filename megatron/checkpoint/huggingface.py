"""Hugging Face's Llama and SmolLM3 layout: names, config.json, and weights both ways.

Our matrices are theirs (q, k, v, gate and up are separate), so a conversion is a rename; only the
vocabulary's padding is cut off on the way out. One tensor is in memory at a time, and a shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.parallel.piece import WEIGHT, Piece

_BLOCK = {
    "input_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What a config.json says of a Llama or SmolLM3 model, in our words."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    ffn_hidden_size: int
    vocab_size: int
    seq_length: int
    tie_embeddings: bool
    nope_interval: int
    rope_theta: float
    rope_scaling: str | None
    rms_norm_eps: float


def names(num_layers: int, tie_embeddings: bool) -> dict[str, str]:
    """Our parameter name -> theirs, in the order of the layers."""
    embedding = "tied_modules.embedding.weight" if tie_embeddings else "0.weight"
    table = {embedding: "model.embed_tokens.weight"}
    for layer in range(num_layers):
        for ours, theirs in _BLOCK.items():
            table[f"{layer + 1}.{ours}"] = f"model.layers.{layer}.{theirs}"
    table[f"{num_layers + 1}.weight"] = "model.norm.weight"
    if not tie_embeddings:
        table[f"{num_layers + 2}.weight"] = "lm_head.weight"
    return table


def is_vocabulary(name: str) -> bool:
    """Whether a Hugging Face name is a matrix with one row a token."""
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def config_json(shape: Shape, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json of a model; rotary settings in both the present and the older spelling."""
    smollm3 = shape.nope_interval > 0
    scaling = _scaling_to_hf(shape.rope_scaling)
    config = {
        "architectures": ["SmolLM3ForCausalLM" if smollm3 else "LlamaForCausalLM"],
        "model_type": "smollm3" if smollm3 else "llama",
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
            "rope_theta": shape.rope_theta, **(scaling or {"rope_type": "default"})
        },
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }  # fmt: skip
    if smollm3:
        config["no_rope_layer_interval"] = shape.nope_interval
        config["no_rope_layers"] = [
            int((layer + 1) % shape.nope_interval != 0) for layer in range(shape.num_layers)
        ]
    return config


def read_shape(folder: Path) -> Shape:
    """The shape of a Hugging Face model folder.

    Raises:
        ValueError: the architecture is none that this framework trains.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in ("LlamaForCausalLM", "SmolLM3ForCausalLM"):
        raise ValueError(
            f"{folder / 'config.json'}: architecture {architecture} is not supported;"
            " LlamaForCausalLM and SmolLM3ForCausalLM are"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{folder / 'config.json'}: biases are not supported")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") not in (None, hidden // heads):
        raise ValueError(
            f"{folder / 'config.json'}: head_dim {config['head_dim']} is not hidden_size /"
            f" num_attention_heads = {hidden} / {heads} = {hidden // heads}"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    default_theta = 2000000.0 if architecture == "SmolLM3ForCausalLM" else 10000.0
    return Shape(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        seq_length=config.get("max_position_embeddings", 2048),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        nope_interval=_nope_interval(config, architecture),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta") or default_theta)),
        rope_scaling=_scaling_from_hf(rope, folder),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def export_weights(
    read: Callable[[str], Tensor],
    shape: Shape,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Writes safetensors shards and their index.

    Args:
        read: our parameter name -> the whole parameter.
        shape: of the model; rows of the vocabulary beyond `vocab_size` are left out.
        folder: where to; exists.
        dtype: of the values written.
        shard_bytes: a shard is closed before it grows beyond this.

    Returns:
        The files written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    files: list[Path] = []
    index: dict[str, str] = {}
    size = total = 0

    def close() -> None:
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shards[0], path, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[0], path.name))
        files.append(path)
        shards[0] = {}

    for ours, theirs in names(shape.num_layers, shape.tie_embeddings).items():
        value = read(ours).to(dtype)
        if is_vocabulary(theirs):
            value = value[: shape.vocab_size]
        value = value.contiguous()
        if shards[0] and size + value.nbytes > shard_bytes:
            close()
            size = 0
        shards[0][theirs] = value
        size += value.nbytes
        total += value.nbytes
    close()
    if len(files) == 1:
        files[0] = files[0].rename(folder / "model.safetensors")
    else:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(about, indent=1))
    return files


def import_pieces(folder: Path, shape: Shape, padded_vocab_size: int) -> Iterator[Piece]:
    """The weights of a Hugging Face folder as whole, unsharded pieces, one at a time.

    Raises:
        ValueError: a weight is missing, or has another shape than config.json says.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file")
    where = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    for ours, theirs in names(shape.num_layers, shape.tie_embeddings).items():
        if theirs not in where:
            raise ValueError(f"{folder} has no weight {theirs}")
        with safe_open(where[theirs], framework="pt") as file:
            value = file.get_tensor(theirs).float()
        if is_vocabulary(theirs):
            if value.shape[0] != shape.vocab_size:
                raise ValueError(
                    f"{theirs} has {value.shape[0]} rows, config.json says {shape.vocab_size}"
                )
            padding = padded_vocab_size - shape.vocab_size
            value = torch.cat([value, value.new_zeros(padding, value.shape[1])])
        yield Piece(ours, tuple(value.shape), None, 0, 1, 0, {WEIGHT: value.reshape(-1)})


def _nope_interval(config: dict[str, Any], architecture: str) -> int:
    if architecture != "SmolLM3ForCausalLM":
        return 0
    interval = int(config.get("no_rope_layer_interval", 4))
    layers = config["num_hidden_layers"]
    expected = [int((layer + 1) % interval != 0) for layer in range(layers)]
    given = config.get("no_rope_layers")
    if given is not None and list(given[:layers]) != expected:
        raise ValueError(f"no_rope_layers {given} is not every {interval}th layer")
    return interval


def _scaling_to_hf(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    kind, _, numbers = text.partition(":")
    factor, low, high, original = (numbers or "8,1,4,8192").split(",")
    return {
        "rope_type": kind,
        "factor": float(factor),
        "low_freq_factor": float(low),
        "high_freq_factor": float(high),
        "original_max_position_embeddings": int(original),
    }


def _scaling_from_hf(rope: dict[str, Any], folder: Path) -> str | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"{folder / 'config.json'}: rope_type {kind} is not supported; llama3 is")
    return (
        f"llama3:{rope['factor']:g},{rope['low_freq_factor']:g},{rope['high_freq_factor']:g},"
        f"{rope['original_max_position_embeddings']}"
    )

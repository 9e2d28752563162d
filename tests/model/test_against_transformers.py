"""Logits, loss and every gradient are those of transformers with the same weights, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend

from megatron.model.stack import Stack
from tests.model.tiny import KINDS, Tiny, batch, build, tiny

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
PARTS = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    **{f"attention.{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
    **{f"attention.{letter}_norm": f"self_attn.{letter}_norm" for letter in "qk"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def their_name(ours: str, config: Tiny) -> str:
    layer, rest = ours.split(".", 1)
    if layer == "tied_modules" or layer == "0":
        return "model.embed_tokens.weight"
    if int(layer) == config.num_layers + 1:
        return "model.norm.weight"
    if int(layer) == config.num_layers + 2:
        return "lm_head.weight"
    part, parameter = rest.rsplit(".", 1)
    return f"model.layers.{int(layer) - 1}.{PARTS[part]}.{parameter}"


def theirs(config: Tiny, model: Stack) -> nn.Module:
    """transformers' model of the same shape with the same weights."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling_factors
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    shape = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": 128,
        "rope_parameters": rope,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if config.head_dim is not None:
        shape["head_dim"] = config.head_dim
    if config.nope_interval:
        their_config = transformers.SmolLM3Config(
            **shape, no_rope_layer_interval=config.nope_interval
        )
        them = transformers.SmolLM3ForCausalLM(their_config)
    elif config.architecture == "qwen3":
        them = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    elif config.architecture == "olmo2":
        them = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**shape))
    else:
        them = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    parameters = dict(them.named_parameters())
    for name, parameter in model.named_parameters():
        their = parameters.pop(their_name(name, config))
        their.data.copy_(
            parameter.data[: config.vocab_size]
            if "embed" in their_name(name, config) or "lm_head" in their_name(name, config)
            else parameter.data
        )
    assert not parameters
    return them


def compare(config: Tiny) -> None:
    model = build(config)
    them = theirs(config, model)
    tokens, labels = batch(config)

    logits = model(tokens)
    loss = model(tokens, labels)
    loss.backward()
    their_logits = them(tokens).logits
    their_loss = nn.functional.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    their_loss.backward()

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape
        return float((a - b).detach().abs().max())

    assert difference(logits[..., : config.vocab_size], their_logits) <= TOLERANCE
    assert abs(loss.item() - their_loss.item()) <= TOLERANCE
    their_gradients = {name: parameter.grad for name, parameter in them.named_parameters()}
    for name, parameter in model.named_parameters():
        want = their_gradients.pop(their_name(name, config))
        got = parameter.grad
        if parameter.shape != want.shape:
            assert torch.count_nonzero(got[config.vocab_size :]) == 0
            got = got[: config.vocab_size]
        assert difference(got, want) <= TOLERANCE, name
        assert float(want.abs().max()) > 1e-3, f"{name}: a gradient of nearly zero shows nothing"


@pytest.mark.parametrize(
    "setting", [{}, {"attention_kernels": (SDPBackend.MATH,)}, {"expand_kv": True}]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt2"])  # test_gpt2.py
def test_logits_loss_and_gradients(kind: str, setting: dict[str, bool]) -> None:
    compare(tiny(kind, **setting))


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    half_head=st.integers(1, 6),
    layers=st.integers(1, 4),
    vocab=st.integers(3, 128),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
    scaling=st.sampled_from([None, "llama3:8,1,4,16", "llama3:32,1,4,64"]),
    nope=st.integers(0, 3),
    tied=st.booleans(),
)
def test_any_shape(
    kv_heads: int, group: int, half_head: int, layers: int, vocab: int, theta: float,
    scaling: str | None, nope: int, tied: bool,
) -> None:  # fmt: skip
    heads = kv_heads * group
    config = tiny(
        num_layers=layers, hidden_size=2 * half_head * heads, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, rope_theta=theta, rope_scaling=scaling,
        nope_interval=nope, tie_embeddings=tied, init_method_std=(2 * half_head * heads) ** -0.5,
    )  # fmt: skip
    model = build(config)
    tokens, _ = batch(config)
    with torch.no_grad():
        logits = model(tokens)[..., :vocab]
        assert float((logits - theirs(config, model)(tokens).logits).abs().max()) <= TOLERANCE

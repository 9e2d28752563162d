"""Small random Hugging Face models of each architecture, as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

KINDS = ("llama", "smollm3", "qwen3", "olmo2", "gpt2")


def hugging_face_model(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any
) -> None:
    """Saves a model of a kind; `settings` are further entries of its config.json."""
    shape = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True))
    elif kind == "olmo2":
        model = Olmo2ForCausalLM(Olmo2Config(**shape))
    elif kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_inner": 96, "n_positions": 64}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ids = {"vocab_size": 200, "bos_token_id": None, "eos_token_id": None, **settings}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, **ids))
    else:
        model = SmolLM3ForCausalLM(SmolLM3Config(**shape, tie_word_embeddings=True))
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:  # else all ones
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.1, 0.1)
        elif name.endswith("wpe.weight"):  # else tied embeddings repeat the last token
            parameter.data.mul_(5)
    model.to(dtype).save_pretrained(folder)

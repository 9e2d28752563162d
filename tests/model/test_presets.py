"""The presets of the Hub are its models: their counts, their config.json, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.checkpoint.huggingface import read_shape
from megatron.config.presets import PRESETS
from tests.config.helpers import configured
from tests.equivalence import front
from tests.spawn import run
from tools import convert_hf


def hub(kind: str, shape: tuple[int, ...], vocabulary: int, **more: Any) -> dict[str, Any]:
    """What transformers is given: the integers as each model's card and config.json state them."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
             "intermediate_size")  # fmt: skip
    return dict(zip(names, shape, strict=True)) | {
        "model_type": kind, "vocab_size": vocabulary, "tie_word_embeddings": True, **more,
    }  # fmt: skip


def llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# name -> (settings, parameters as the Hub counts them)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (hub("llama", (30, 576, 9, 3, 1536), 49152, rms_norm_eps=1e-5,
                         rope_parameters=plain(1e5)), 134_515_008),
    "SmolLM2-360M": (hub("llama", (32, 960, 15, 5, 2560), 49152, rms_norm_eps=1e-5,
                         rope_parameters=plain(1e5)), 361_821_120),
    "SmolLM2-1.7B": (hub("llama", (24, 2048, 32, 32, 8192), 49152, rms_norm_eps=1e-5,
                         rope_parameters=plain(1.3e5)), 1_711_376_384),
    "SmolLM3-3B": (hub("smollm3", (36, 2048, 16, 4, 11008), 128256, rms_norm_eps=1e-6,
                       no_rope_layer_interval=4, rope_parameters=plain(5e6)), 3_075_098_624),
    "Llama-3.2-1B": (hub("llama", (16, 2048, 32, 8, 8192), 128256, rms_norm_eps=1e-5,
                         rope_parameters=llama3(32)), 1_235_814_400),
    "Llama-3.2-3B": (hub("llama", (28, 3072, 24, 8, 8192), 128256, rms_norm_eps=1e-5,
                         rope_parameters=llama3(32)), 3_212_749_824),
    "Llama-3.1-8B": (hub("llama", (32, 4096, 32, 8, 14336), 128256, rms_norm_eps=1e-5,
                         tie_word_embeddings=False, rope_parameters=llama3(8)), 8_030_261_248),
    "Llama-3.1-70B": (hub("llama", (80, 8192, 64, 8, 28672), 128256, rms_norm_eps=1e-5,
                          tie_word_embeddings=False, rope_parameters=llama3(8)), 70_553_706_496),
}  # fmt: skip
TINY = {"NLAYERS": "4", "HEADS": "6", "NUM_KV_HEAD": "2", "HIDDEN": "48"}


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_of_the_hub_is_its_model(name: str) -> None:
    settings, count = MODELS[name]
    theirs = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    configuration = configured(MODEL_ARCH=name)
    assert configuration.parameters == sum(p.numel() for p in model.parameters()) == count
    ours = configuration.architecture.hugging_face_config(configuration.model)
    assert {key: ours[key] for key in settings} == settings
    if settings["model_type"] == "smollm3":
        assert ours["no_rope_layers"] == theirs.no_rope_layers


def test_every_llama_and_smollm_of_the_table_is_held_to_transformers() -> None:
    listed = {name for name in PRESETS if name.startswith(("SmolLM", "Llama"))}
    assert listed == MODELS.keys()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SmolLM3-3B", "SmolLM3ForCausalLM"), ("Llama-3.2-3B", "LlamaForCausalLM")],
)
def test_a_tiny_variant_goes_to_the_format_of_the_hub_and_back(
    name: str, kind: str, tmp_path: Path
) -> None:
    variables = {**TINY, "MODEL_ARCH": name, "RUN_DIR": str(tmp_path / "run")}
    ((_, logits),) = run(front.train_and_save, 1, variables, 1)
    assert convert_hf.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    config = front.run_config(variables)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model).__name__ == kind
    with torch.no_grad():
        expected = model(front.probe(config)).logits
    assert (logits[..., :200] - expected).abs().max() <= 1e-5

    assert read_shape(tmp_path / "hf").identity() == config.model.identity()
    assert convert_hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    assert convert_hf.main(["export", str(tmp_path / "again"), str(tmp_path / "back")]) == 0
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

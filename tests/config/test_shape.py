"""The shape of a model: what heads are wide, what a checkpoint is held to, what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.presets import PRESETS
from megatron.config.schema import RunConfig
from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from tests.config.helpers import configured, refusal

OLD_MANIFEST = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
    "ffn_hidden_size": 160, "vocab_size": 4096, "tie_embeddings": False, "nope_interval": 0,
    "rope_theta": 50000.0, "rope_scaling": None, "rms_norm_eps": 1e-05,
}  # fmt: skip
"""The model of a checkpoint written before there were other architectures."""


def test_an_older_checkpoint_is_of_the_same_model() -> None:
    run = configured(NLAYERS=4, HIDDEN=64, HEADS=8, NUM_KV_HEAD=4, FFN_HIDDEN_SIZE=160)
    assert ModelShape(**OLD_MANIFEST).identity() == run.model.identity()
    assert ModelShape(**run.model.identity()).identity() == run.model.identity()


@pytest.mark.parametrize("change", [{"HEAD_DIM": 16}, {"ARCHITECTURE": "qwen3"}])
def test_another_head_or_architecture_is_another_model(change: dict) -> None:
    settings = {"NLAYERS": 4, "HIDDEN": 64, "HEADS": 8, "NUM_KV_HEAD": 4, "FFN_HIDDEN_SIZE": 160}
    run = configured(**settings, **change)
    assert ModelShape(**OLD_MANIFEST).identity() != run.model.identity()


def test_heads_are_as_wide_as_told_or_as_follows() -> None:
    assert configured(HIDDEN=64, HEADS=8, NUM_KV_HEAD=4).model.head_width == 8
    wide = configured(HIDDEN=64, HEADS=8, NUM_KV_HEAD=4, HEAD_DIM=20).model
    assert (wide.head_width, wide.query_size, wide.key_value_size) == (20, 160, 80)
    assert configured(HIDDEN=64, HEADS=6, NUM_KV_HEAD=3, HEAD_DIM=16).model.query_size == 96
    same = configured(HIDDEN=64, HEADS=8, NUM_KV_HEAD=4, HEAD_DIM=8).model
    assert same.identity() == configured(HIDDEN=64, HEADS=8, NUM_KV_HEAD=4).model.identity()


def test_an_older_run_json_is_read() -> None:
    run = configured()
    values = run.to_dict()
    del values["model"]["architecture"], values["model"]["head_dim"]
    assert RunConfig.from_dict(values) == run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ARCHITECTURE": "gpt"}, ["ARCHITECTURE=gpt", "llama", "qwen3"]),
        ({"HEAD_DIM": 7}, ["HEAD_DIM=7", "odd", "HEAD_DIM=8"]),
        ({"HEAD_DIM": 0}, ["HEAD_DIM=0", "at least 1"]),
        (
            {"ARCHITECTURE": "qwen3", "NOPE_INTERVAL": 4},
            ["NOPE_INTERVAL=4", "ARCHITECTURE=qwen3", "NOPE_INTERVAL=0"],
        ),
    ],
)
def test_refusals(settings: dict, words: list[str]) -> None:
    message = refusal(**settings)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_of_a_known_architecture(name: str) -> None:
    assert configured(MODEL_ARCH=name, VOCAB_SIZE=32000).model.architecture in ARCHITECTURES


def test_architectures_are_known_without_torch() -> None:
    """Their counts are part of a dry run on a login node."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from megatron.model.registry import ARCHITECTURES\n"
        "from megatron.config.shape import ModelShape\n"
        "shape = ModelShape(num_layers=1, hidden_size=8, num_attention_heads=2,"
        " num_key_value_heads=1, ffn_hidden_size=8, seq_length=4, vocab_size=9)\n"
        "for kind in ARCHITECTURES.values():\n"
        "    assert kind.parameters(shape) > 0 and kind.flops_per_token_lm(shape) > 0\n"
        "    assert kind.hugging_face_names(shape) and kind.hugging_face_config(shape)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)

"""GPT-2 is transformers' GPT2LMHeadModel with the same weights in fp32; its counts are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.checkpoint import huggingface
from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from megatron.model.stack import Stack
from tests.config.helpers import configured, refusal
from tests.model.tiny import Tiny, batch, build, tiny

GPT2 = ARCHITECTURES["gpt2"]
TOLERANCE = 1e-5


def exported(model: Stack, config: Tiny, folder: Path) -> None:
    """The model as a Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    huggingface.write_config(config, folder, "float32", None)
    huggingface.export_weights(weights.__getitem__, shapes, config, folder, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients(tied: bool, tmp_path: Path) -> None:
    config = tiny("gpt2", tie_embeddings=tied)
    model = build(config)
    exported(model, config, tmp_path)
    them = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager")
    tokens, labels = batch(config)
    logits, loss = model(tokens)[..., : config.vocab_size], model(tokens, labels)
    loss.backward()
    wanted = them(tokens).logits
    wanted_loss = nn.functional.cross_entropy(wanted.flatten(0, 1), labels.flatten())
    wanted_loss.backward()
    assert float((logits - wanted).abs().max()) <= TOLERANCE
    assert abs(float(loss - wanted_loss)) <= TOLERANCE

    ours: dict[str, list[torch.Tensor]] = {}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, theirs in GPT2.hugging_face_names(config).items():
        ours.setdefault(theirs, []).append(gradients.pop(name))
    assert not gradients
    for name, parameter in them.named_parameters():
        got = torch.cat(ours.pop(name))
        got = got.t() if GPT2.is_transposed(name) else got[: len(parameter)]
        assert float((got - parameter.grad).abs().max()) <= TOLERANCE, name
        assert float(parameter.grad.abs().max()) > 1e-3, f"{name}: nearly zero shows nothing"
    assert not ours


def test_files_of_a_bare_model_with_the_mask_of_older_ones(tmp_path: Path) -> None:
    """As the first GPT-2 of the Hub: no `transformer.` before a name, the causal mask stored."""
    from safetensors.torch import load_file, save_file

    config = tiny("gpt2")
    model = build(config)
    exported(model, config, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): w for name, w in load_file(file).items()}
    mask = torch.ones(1, 1, 24, 24).tril()
    save_file({**weights, "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4)}, file)
    read = huggingface.open_weights(tmp_path, huggingface.read_shape(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(read(name)[: len(parameter)], parameter), name


def test_what_is_not_computed_is_refused(tmp_path: Path) -> None:
    for entry in (
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ):
        GPT2Config(architectures=["GPT2LMHeadModel"], **entry).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"{next(iter(entry))}="):
            huggingface.read_shape(tmp_path)


def test_counts() -> None:
    run = configured(MODEL_ARCH="gpt2")
    padding = (run.model.padded_vocab_size() - 50257) * 768
    assert run.parameters - padding == 124_439_808  # transformers' own count of the 124M
    small = configured(MODEL_ARCH="shakespeare", VOCAB_SIZE=65, TOKENIZER_TYPE="NullTokenizer")
    built = sum(p.numel() for p in build(_tiny_of(small.model)).parameters())
    assert built == small.parameters
    h, f, s = 768, 3072, 1024
    blocks = 12 * (2 * (4 * h * h + 2 * h * f) + 4 * h * s)
    assert GPT2.flops_per_token_lm(run.model) == 3 * (blocks + 2 * 50304 * h)


def _tiny_of(shape: ModelShape) -> Tiny:
    return Tiny(**{name: getattr(shape, name) for name in ModelShape.__dataclass_fields__})


def test_a_table_of_positions_binds_the_length() -> None:
    """Llama's weights fit any length; those of learned positions do not."""
    long, short = (tiny("gpt2", seq_length=length) for length in (24, 16))
    assert short.changes_since(long.identity()) == ["seq_length 24 -> 16"]
    assert tiny(seq_length=24).changes_since(tiny(seq_length=16).identity()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"NUM_KV_HEAD": 2}, ["NUM_KV_HEAD=2", "HEADS=4", "set NUM_KV_HEAD=4"]),
        ({"NUM_KV_HEAD": 4, "HEAD_DIM": 64}, ["HEAD_DIM=64", "HIDDEN=128", "unset HEAD_DIM"]),
        ({"NUM_KV_HEAD": 4, "NOPE_INTERVAL": 4}, ["NOPE_INTERVAL=4", "NOPE_INTERVAL=0"]),
    ],
    ids=str,
)
def test_what_gpt2_cannot_have_is_refused(settings: dict[str, int], words: list[str]) -> None:
    message = refusal(ARCHITECTURE="gpt2", HEADS=4, HIDDEN=128, **settings)
    assert [word for word in words if word not in message] == []

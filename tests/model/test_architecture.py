"""Parameter counts are exact, and FLOPs reproduce the published figures."""

import json
from pathlib import Path

import pytest

from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from tests.config.helpers import configured

LLAMA = ARCHITECTURES["llama"]
FIGURES = json.loads((Path(__file__).parent / "seed_figures.json").read_text())


def _shape(row: dict) -> ModelShape:
    return ModelShape(
        num_layers=row["num_layers"], hidden_size=row["hidden"], num_attention_heads=row["heads"],
        num_key_value_heads=row["kv_heads"], ffn_hidden_size=row["ffn"], seq_length=row["seq"],
        vocab_size=row["padded_vocab"], tie_embeddings=row["tied"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "row", FIGURES["small_models"], ids=lambda r: f"{r['model_arch']}-{r['num_layers']}"
)
def test_small_models(row):
    run = configured(
        MODEL_ARCH=row["model_arch"],
        NLAYERS=row["num_layers"],
        GRAD_ACC_STEPS=2,
        MICRO_BATCH=1,
        USE_ACTIVATION_CHECKPOINTING=0,
        ZERO_STAGE=0,
        OPT="adamw",
        LR_DECAY_STYLE="constant",
        TOKENIZER_TYPE="HFTokenizer",
        TOKENIZER_MODEL="google/gemma-7b",
        DATA_FILE_LIST="ALCF/data-lists/aurora/books.txt",
        NHOSTS=2,
        NGPU_PER_HOST=12,
    )
    assert run.parameters == row["parameters"]
    assert (run.train.global_batch_size, run.data_parallel, run.model.seq_length) == (48, 24, 8192)
    flops = {
        "LM": LLAMA.flops_per_token_lm(run.model),
        "DS": LLAMA.flops_per_token_ds(run.model),
    }[row["formula"]]
    assert row["tokens_per_gpu_per_second"] * flops / 1e12 == pytest.approx(row["tflops"], rel=5e-3)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"MODEL_ARCH": "2B", "VOCAB_SIZE": 256000}, 1_986_054_144),
        ({"MODEL_ARCH": "70B", "VOCAB_SIZE": 32000}, 68_976_648_192),
        ({"MODEL_ARCH": "7B", "VOCAB_SIZE": 32000}, 5_933_109_248),
        ({"MODEL_ARCH": "llama3-3B", "VOCAB_SIZE": 256000}, 4_391_611_392),
        ({"MODEL_ARCH": "SmolLM2-135M"}, 134_515_008),
        ({"MODEL_ARCH": "SmolLM2-360M"}, 361_821_120),
        ({"MODEL_ARCH": "SmolLM2-1.7B"}, 1_711_376_384),
        ({"MODEL_ARCH": "Llama-3.2-1B"}, 1_235_814_400),
        ({"MODEL_ARCH": "Llama-3.1-8B"}, 8_030_261_248),
        ({"MODEL_ARCH": "Qwen3-0.6B"}, 596_049_920),
        ({"MODEL_ARCH": "Qwen3-1.7B"}, 1_720_574_976),
        ({"MODEL_ARCH": "Qwen3-4B"}, 4_022_468_096),
        ({"MODEL_ARCH": "Qwen3-8B"}, 8_190_735_360),
    ],
)
def test_parameters_of_presets(settings, count):
    assert configured(**settings).parameters == count


def test_70b_rows():
    shape = _shape(FIGURES["shape_70B"])
    assert LLAMA.parameters(shape) == FIGURES["shape_70B"]["parameters"]
    flops = LLAMA.flops_per_token_lm(shape)
    for row in FIGURES["pipeline_70B"] + FIGURES["zero3_70B"]:
        tflops = row["tokens_per_gpu_per_second"] * flops / 1e12
        assert tflops == pytest.approx(row["tflops"], rel=5e-3)


def test_42b_rows():
    flops = LLAMA.flops_per_token_lm(_shape(FIGURES["shape_42B"]))
    for row in FIGURES["tensor_parallel_42B"]:
        tflops = row["tokens_per_gpu_per_second"] * flops / 1e12
        assert tflops == pytest.approx(row["tflops"], rel=5e-3)


def test_log_with_checkpointing():
    run = configured(MODEL_ARCH="7B", NLAYERS=3, VOCAB_SIZE=32000, USE_ACTIVATION_CHECKPOINTING=1)
    mode = run.train.activation_checkpointing
    for row in FIGURES["log_7B_3_layers"]:
        lm = row["tgs"] * LLAMA.flops_per_token_lm(run.model) / 1e12
        ds = row["tgs"] * LLAMA.flops_per_token_ds(run.model, mode) / 1e12
        assert (lm, ds) == (pytest.approx(row["LM"], rel=5e-3), pytest.approx(row["DS"], rel=5e-3))


def test_causal_drops_half_of_the_attention():
    shape = configured(MODEL_ARCH="7B", VOCAB_SIZE=32000).model
    attention = 12 * shape.num_layers * shape.hidden_size * shape.seq_length
    full = LLAMA.flops_per_token_lm(shape)
    assert full - LLAMA.flops_per_token_causal(shape) == attention // 2


def test_selective_recompute_adds_attention_once():
    shape = configured(MODEL_ARCH="2B", VOCAB_SIZE=32000).model
    extra = LLAMA.flops_per_token_ds(shape, "selective") - LLAMA.flops_per_token_ds(shape)
    assert extra == 4 * shape.num_layers * shape.hidden_size * shape.seq_length


@pytest.mark.parametrize(
    ("vocabulary", "tp", "padded"),
    [(256000, 1, 256000), (50257, 1, 50304), (50257, 4, 50688), (1, 2, 256), (32000, 2, 32000)],
)
def test_padding(vocabulary, tp, padded):
    assert ModelShape(vocab_size=vocabulary).padded_vocab_size(tp) == padded

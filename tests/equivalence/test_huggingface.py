"""Export and import against transformers: logits, losses and the steps that follow."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.hugging_face_models import hugging_face_model
from tests.equivalence import front
from tests.spawn import run
from tools import convert_hf

GPT2 = {"ARCHITECTURE": "gpt2", "NUM_KV_HEAD": "8", "TIE_EMBEDDINGS": "1", "SEQ": "64"}
LAYOUTS = {
    "tp1": {},
    "tp2": {"TP": "2"},
    "pp2": {"PP": "2"},
    "tp2-pp2": {"TP": "2", "PP": "2"},
    "dp2-zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
    "tp2-dp2-zero3": {"TP": "2", "WORLD_SIZE": "4", "ZERO_STAGE": "3"},
    "tp2-dp2-zero2": {"TP": "2", "WORLD_SIZE": "4", "ZERO_STAGE": "2"},
    "tied-nope-pp2": {"PP": "2", "TIE_EMBEDDINGS": "1", "NOPE_INTERVAL": "4"},
    "llama3-scaling": {"ROPE_SCALING": "llama3:8,1,4,16", "ROPE_THETA": "10000"},
    "schedule-free": {"OPT": "adamwschedulefree", "LR": "0.01"},
    "muon": {"OPT": "muon", "LR": "0.01", "TP": "2"},
    "wide-heads": {"HEAD_DIM": "12"},
    "tp2-sequence": {"TP": "2", "SEQUENCE_PARALLEL": "1"},
    "ulysses": {"SP": "2"},
    "qwen3-tp2-pp2": {"ARCHITECTURE": "qwen3", "HEAD_DIM": "16", "TP": "2", "PP": "2"},
    "qwen3-muon-tied": {
        "ARCHITECTURE": "qwen3",
        "TIE_EMBEDDINGS": "1",
        "OPT": "muon",
        "LR": "0.01",
    },
    "gpt2-tp2-pp2": {**GPT2, "TP": "2", "PP": "2"},
    "olmo2-tp2-dp2-zero2": {
        "ARCHITECTURE": "olmo2",
        "TP": "2",
        "WORLD_SIZE": "4",
        "ZERO_STAGE": "2",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(layout: str, tmp_path: Path) -> None:
    variables = {**LAYOUTS[layout], "RUN_DIR": str(tmp_path / "run")}
    config = front.run_config(variables)
    results = run(front.train_and_save, front.world(variables), variables, 3)
    assert convert_hf.main(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert model.config.vocab_size == 200, "the padding is cut off"
    with torch.no_grad():
        expected = model(front.probe(config)).logits
    parts = [logits for _, logits in results if logits is not None]
    tp = int(variables.get("TP", "1"))
    ours = torch.cat(parts[:tp], dim=-1)[..., :200]
    assert (ours - expected).abs().max() <= 1e-5


VARIABLES_OF = {
    "llama": {"ROPE_THETA": "10000"},
    "smollm3": {"ROPE_THETA": "2000000", "TIE_EMBEDDINGS": "1", "NOPE_INTERVAL": "4"},
    "qwen3": {
        "ROPE_THETA": "10000",
        "TIE_EMBEDDINGS": "1",
        "ARCHITECTURE": "qwen3",
        "HEAD_DIM": "16",
    },
    "olmo2": {"ROPE_THETA": "10000", "ARCHITECTURE": "olmo2"},
    "gpt2": GPT2,
}


ALONE = [*product(VARIABLES_OF, ("tp1",), ("sgd", "adamw"))]
SHARDED = [
    *product(VARIABLES_OF, ("tp2-pp2",)),
    *product(("qwen3", "olmo2"), ("tp2-sequence", "ulysses")),
    ("olmo2", "dp2-zero3"),
    ("qwen3", "tp2-dp2-zero3"),
    ("gpt2", "tp2-sequence"),
]
RARE = [("gpt2", layout) for layout in ("ulysses", "dp2-zero3", "tp2-dp2-zero3", "tp2-dp2-zero2")]


@pytest.mark.parametrize(
    ("kind", "layout", "optimizer"),
    [
        *ALONE,
        *((*case, "sgd") for case in SHARDED),
        *(pytest.param(*case, "adamw", marks=pytest.mark.long) for case in SHARDED + RARE),
    ],
)
def test_import_follows_a_plain_loop(
    kind: str, layout: str, optimizer: str, tmp_path: Path
) -> None:
    hugging_face_model(kind, tmp_path / "hf")
    assert convert_hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    rate = {"sgd": "0.1", "adamw": "0.001"}[optimizer]
    variables = {
        **LAYOUTS[layout],
        **VARIABLES_OF[kind],
        "RUN_DIR": str(tmp_path / "run"),
        "OPT": optimizer,
        "LR": rate,
        "WEIGHT_DECAY": "0.1" if optimizer == "adamw" else "0",
    }
    ours = run(front.resume_and_train, front.world(variables), variables, 10)[0]
    plain = plain_loop(tmp_path / "hf", front.run_config(variables), 10)
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, plain, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, abs=1e-5)


def plain_loop(folder: Path, config, count: int) -> list[tuple[float, float]]:
    """The steps with nothing but torch and transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    else:
        optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
        )
    curve = []
    for step in range(count):
        batch = front.samples(config, step)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        curve.append((loss.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return curve


def test_the_printed_command_sets_what_the_architecture_needs(tmp_path: Path, capsys) -> None:
    hugging_face_model("qwen3", tmp_path / "hf")
    assert convert_hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    words = capsys.readouterr().out.split()
    for word in ("ARCHITECTURE=qwen3", "HEAD_DIM=16", "NUM_KV_HEAD=4", "RMS_NORM_EPS=1e-05"):
        assert word in words
    assert "TIE_EMBEDDINGS=1" in words and not any("ROPE_SCALING" in word for word in words)


def import_train_and_save(variables: dict[str, str]) -> torch.Tensor | None:
    """Two steps from the imported model, saved; the logits of a fixed input."""
    run_of, control = front.run_config(variables), front.make_control()
    engine = front.build(run_of)
    state = front.resume(run_of, engine, None, control)
    front.steps(run_of, engine, state.iteration, 2)
    front.save(run_of, engine, 2, control)
    return engine.logits(front.probe(run_of))


@pytest.mark.parametrize("layout", ["tp2", "dp2-zero3"])
def test_an_imported_model_is_exported_after_training(layout: str, tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": [2, 7], "max_position_embeddings": 4096}
    hugging_face_model("qwen3", tmp_path / "hf", **ids)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_text(f'{{"note": "{name}"}}')
    assert convert_hf.main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    variables = {**LAYOUTS[layout], **VARIABLES_OF["qwen3"], "RUN_DIR": str(tmp_path / "run")}
    results = run(import_train_and_save, front.world(variables), variables)
    assert convert_hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0

    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "out")
    )
    assert after == before
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == f'{{"note": "{name}"}}'
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = model(front.probe(front.run_config(variables))).logits
    parts = results if layout == "tp2" else results[:1]
    ours = torch.cat(parts, dim=-1)[..., :200]
    assert (ours - expected).abs().max() <= 1e-5

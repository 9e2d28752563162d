"""Import and export: each weight, entry and file survives, or the tool says why not."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.checkpoint import export_folder, huggingface, store
from megatron.checkpoint.state import RunState
from megatron.config.shape import ModelShape
from megatron.data.indexed import IndexedWriter
from megatron.model.registry import ARCHITECTURES
from megatron.parallel.piece import WEIGHT, Piece
from megatron.training import hf_export
from tests.checkpoint.hugging_face_models import KINDS, hugging_face_model
from tests.checkpoint.made import make_saver
from tests.data.prepare.bpe import write_tokenizer
from tests.training.run_config import tiny_run
from tools import convert_hf

TEXTS = ["the quick brown fox jumps over 1234 lazy dogs. " * 20]


def model_with_files(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A model with tokenizer and generation settings, as the hub has them."""
    ids = {"bos_token_id": 0, "eos_token_id": [0, 7], "pad_token_id": 3}
    hugging_face_model(kind, folder, dtype, max_position_embeddings=256, **ids)
    write_tokenizer(folder, "smollm2", TEXTS)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    generation = {"temperature": 0.6, "eos_token_id": [0, 7]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def convert(*words: Any) -> int:
    """The tool's exit status."""
    return convert_hf.main([str(word) for word in words])


def change_config(folder: Path, **entries: Any) -> None:
    """Sets entries of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_is_exported_as_it_came(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source, out = model_with_files(kind, tmp_path / "hf", dtype), tmp_path / "out"
    assert convert("import", source, tmp_path / "run") == 0
    assert convert("export", tmp_path / "run", out) == 0

    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], value), name
    wanted, found = (json.loads((path / "config.json").read_text()) for path in (source, out))
    assert found == wanted
    for path in source.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (source, out)]
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        first, second = (model(tokens).logits for model in models)
    assert torch.equal(first, second)
    assert AutoTokenizer.from_pretrained(out).encode("fox") == AutoTokenizer.from_pretrained(
        source
    ).encode("fox")
    mode = stat.S_IMODE((out / "model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((out / "config.json").stat().st_mode), "as the umask says"


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    hugging_face_model("qwen3", tmp_path / "hf")
    shape = huggingface.read_shape(tmp_path / "hf")
    pieces = {piece.name: piece for piece in huggingface.import_pieces(tmp_path / "hf", shape)}
    (tmp_path / "out").mkdir()
    files = huggingface.export_weights(
        lambda name: pieces[name].tensors[WEIGHT].view(pieces[name].shape),
        {name: piece.shape for name, piece in pieces.items()},
        shape,
        tmp_path / "out",
        torch.float32,
        shard_bytes=100_000,
    )
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(path.stat().st_size for path in files) < 110_000
    (tmp_path / "out" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    one, many = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("hf", "out")
    )
    assert all(torch.equal(value, many[name]) for name, value in one.items())
    # And back from shards, with a file beside them that the index does not name.
    save_file({"foreign": torch.zeros(1)}, tmp_path / "out" / "consolidated.safetensors")
    again = {piece.name: piece for piece in huggingface.import_pieces(tmp_path / "out", shape)}
    assert all(
        torch.equal(piece.tensors[WEIGHT], again[name].tensors[WEIGHT])
        for name, piece in pieces.items()
    )


@pytest.mark.parametrize(
    ("kind", "missing", "expected"),
    [
        ("smollm3", "tie_word_embeddings", {"tie_embeddings": True}),
        ("llama", "tie_word_embeddings", {"tie_embeddings": False}),
        ("olmo2", "rms_norm_eps", {"rms_norm_eps": 1e-5}),
        ("llama", "rms_norm_eps", {"rms_norm_eps": 1e-6}),
        ("llama", "num_key_value_heads", {"num_key_value_heads": 8}),
        ("smollm3", "rope_parameters", {"rope_theta": 2e6}),
        ("qwen3", "head_dim", {"head_dim": 128}),
    ],
)
def test_what_config_json_leaves_out_is_what_transformers_takes(
    kind: str, missing: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    hugging_face_model(kind, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[missing]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = huggingface.read_shape(tmp_path)
    assert {name: getattr(shape, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MptForCausalLM"]}, "MptForCausalLM is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu (silu only)"),
        ({"attention_bias": True}, "attention_bias=True (no biases)"),
        ({"mlp_bias": True}, "mlp_bias=True (no biases)"),
        ({"use_sliding_window": True}, "use_sliding_window=True (no sliding windows)"),
        ({"layer_types": ["sliding_attention"] * 4}, "(no sliding_attention)"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn (default and llama3 only)"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type=linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 (1 only)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ({"hidden_act": "relu", "mlp_bias": True}, "hidden_act=relu (silu only); mlp_bias=True"),
    ],
)
def test_what_this_framework_does_not_compute_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_model("qwen3", tmp_path / "hf")
    change_config(tmp_path / "hf", **change)
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error and "config.json" in error
    assert not (tmp_path / "run").exists()


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


NORM = "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(NORM), f"has no weight {NORM}"),
        (lambda w: w.update({BIAS: torch.ones(64)}), f"would be lost: {BIAS}"),
        (lambda w: w.update({NORM: w[NORM] * float("nan")}), f"{NORM} is not finite"),
        (lambda w: w.update({NORM: w[NORM].to(torch.int8)}), f"{NORM} is torch.int8"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hugging_face_model("llama", tmp_path / "hf")
    rewrite_weights(tmp_path / "hf", change)
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not store.committed(tmp_path / "run" / "checkpoints")


def test_frequencies_and_a_copy_of_the_embedding_are_no_weights_of_their_own(
    tmp_path: Path,
) -> None:
    hugging_face_model("qwen3", tmp_path / "hf")
    embedding = "model.embed_tokens.weight"
    rewrite_weights(
        tmp_path / "hf",
        lambda w: w.update(
            {
                "lm_head.weight": w[embedding].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            }
        ),
    )
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    rewrite_weights(tmp_path / "hf", lambda w: w["lm_head.weight"].add_(1))
    assert convert("import", tmp_path / "hf", tmp_path / "other") == 2


def test_an_import_does_not_mix_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_model("llama", tmp_path / "hf")
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 2
    assert "holds checkpoints already" in capsys.readouterr().err


def test_an_import_of_before_is_exported_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_with_files("llama", tmp_path / "hf")
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    for path in (tmp_path / "run" / "huggingface-import").iterdir():
        path.unlink()
    assert convert("export", tmp_path / "run", tmp_path / "out") == 0
    assert "max_position_embeddings is 2048" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


# --- A run's checkpoints --------------------------------------------------------------------------


def commit_pieces(
    root: Path, step: int, pieces: Iterable[Piece], entries: Mapping[str, Any]
) -> Path:
    """Commits pieces with these entries of the manifest."""
    done = make_saver(root).save(step, pieces, entries, [])
    assert done is not None and done.path is not None, done
    return done.path


def commit(
    root: Path, step: int, names: tuple[str, ...] = (), value: float = 1.0, **data: Any
) -> Path:
    """Commits a small llama; `names` are further parameters, `data` the run's settings."""
    shape = ModelShape(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=2,
        ffn_hidden_size=8, seq_length=4, vocab_size=9,
    )  # fmt: skip
    sizes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "gate": (8, 8), "up": (8, 8)}
    pieces = []
    for name in [*ARCHITECTURES["llama"].hugging_face_names(shape), *names]:
        size = sizes.get(name.split(".")[-2], (8, 8) if "down" in name else (8,))
        size = (128, 8) if name in ("0.weight", "3.weight") else size
        weight = torch.full(size, value).reshape(-1)
        pieces.append(Piece(name, size, None, 0, 1, 0, {WEIGHT: weight}))
    settings = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, **data}
    state = RunState(iteration=step).to_dict()
    del state["data"]
    entries = {
        "state": state,
        "model": shape.identity(),
        "optimizer": "sgd",
        "layout": "",
        "run": {"model": {"seq_length": 4}, "data": settings},
        "counters": {},
        "loss_scaler": {},
    }
    return commit_pieces(root, step, pieces, entries)


def test_no_parameter_is_left_out_of_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    added = ("1.attention.q_norm.weight", "1.attention.k_norm.weight")
    commit(tmp_path / "run" / "checkpoints", 2, added)
    assert convert("export", tmp_path / "run", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 have no Hugging Face name: 1.attention.k_norm.weight, 1.attention.q_norm" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left of it"


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    shape = ModelShape(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=2,
        ffn_hidden_size=8, seq_length=4, vocab_size=9,
    )  # fmt: skip
    shapes = dict.fromkeys(ARCHITECTURES["llama"].hugging_face_names(shape), (8, 8))
    del shapes["1.mlp.up.weight"]
    with pytest.raises(ValueError, match=r"the checkpoint has no 1\.mlp\.up\.weight"):
        huggingface.export_weights(torch.zeros, shapes, shape, tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(float("nan"), "float32", "is not finite"), (1e6, "float16", "overflows torch.float16")],
)
def test_only_finite_weights_are_exported(
    value: float,
    dtype: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit(tmp_path / "run" / "checkpoints", 2, value=value)
    assert convert("export", tmp_path / "run", tmp_path / "out", "--dtype", dtype) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_earlier_one_of_its_run_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    commit(tmp_path / "run" / "checkpoints", 2)
    commit(tmp_path / "other" / "checkpoints", 2)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert convert("export", tmp_path / "run", out) == 2
    assert "is no export of this run" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()

    assert convert("export", tmp_path / "run", out) == 0, "an empty folder"
    commit(tmp_path / "run" / "checkpoints", 4, value=2.0)
    assert convert("export", tmp_path / "run", out) == 0, "the run's own"
    assert json.loads((out / export_folder.NOTE).read_text())["step"] == 4
    assert load_file(out / "model.safetensors")[NORM][0] == 2.0
    assert convert("export", tmp_path / "other", out) == 2
    assert "is an export of" in capsys.readouterr().err
    (out / "README.md").write_text("a card")
    assert convert("export", tmp_path / "run", out) == 2
    assert "README.md came later and would be lost" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "run"]


def test_an_export_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    commit(tmp_path / "run" / "checkpoints", 2)
    assert convert("export", tmp_path / "run", out) == 0
    whole = (out / "model.safetensors").read_bytes()

    def full(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "_write_shard", full)
    assert convert("export", tmp_path / "run", out) == 2
    assert (out / "model.safetensors").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


# --- EXPORT_HF ------------------------------------------------------------------------------------


@pytest.fixture
def exporter(tmp_path: Path) -> tuple[hf_export.Exporter, list[str]]:
    lines: list[str] = []
    return hf_export.Exporter(tiny_run(tmp_path / "run"), lines.append), lines


Pair = tuple[hf_export.Exporter, list[str]]


def exported(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "huggingface").iterdir())


def test_each_save_is_exported_behind_the_steps(exporter: Pair, tmp_path: Path) -> None:
    made, warnings = exporter
    root = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        made.start(commit(root, step, value=step))
        made.close()
    assert exported(tmp_path) == ["step-00000002", "step-00000004"]
    weights = load_file(tmp_path / "run/huggingface/step-00000004/model.safetensors")
    assert weights[NORM][0] == 4
    assert warnings == []


def test_one_export_at_a_time_and_the_newest_is_never_skipped(
    exporter: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, warnings = exporter
    begun, go = threading.Event(), threading.Event()
    running, most = [0], [0]
    export = hf_export.export_checkpoint

    def slow(*arguments: Any) -> str:
        running[0] += 1
        most[0] = max(most[0], running[0])
        begun.set()
        assert go.wait(20)
        try:
            return export(*arguments)
        finally:
            running[0] -= 1

    monkeypatch.setattr(hf_export, "export_checkpoint", slow)
    root = tmp_path / "run" / "checkpoints"
    made.start(commit(root, 1))
    assert begun.wait(20)
    for step in (2, 3, 4):
        made.start(commit(root, step))
    assert [path.name for path in made.needed] == ["step-00000001", "step-00000004"]
    go.set()
    made.close()
    assert exported(tmp_path) == ["step-00000001", "step-00000004"]
    assert most == [1] and made.needed == ()
    assert [line.split(":")[0] for line in warnings] == [
        "the export of step-00000002 is skipped",
        "the export of step-00000003 is skipped",
    ]


def test_a_failed_export_is_a_warning(exporter: Pair, tmp_path: Path) -> None:
    made, warnings = exporter
    root = tmp_path / "run" / "checkpoints"
    path = commit(root, 2)
    (path / "rank-00000-of-00001.safetensors").write_bytes(b"torn")
    made.start(path)
    made.start(root / "step-00000009")  # retention was faster
    made.close()
    made.start(commit(root, 4))
    made.close()
    assert exported(tmp_path) == ["step-00000004"]
    assert any("step-00000009 is not exported" in line and "KEEP_LAST" in line for line in warnings)


def test_an_export_is_given_up_at_the_limit(
    exporter: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, warnings = exporter
    path = commit(tmp_path / "run" / "checkpoints", 2)
    begun = threading.Event()
    whole = hf_export.TensorReader.whole

    def slow(self: Any, name: str, state: str = WEIGHT) -> torch.Tensor:
        begun.set()
        threading.Event().wait(0.2)
        return whole(self, name, state)

    monkeypatch.setattr(hf_export.TensorReader, "whole", slow)
    made.start(path)
    assert begun.wait(20)
    made.close(limit_s=0.1)
    assert exported(tmp_path) == []
    assert warnings == ["the export of step-00000002 is given up: the run ends"]


def test_what_a_dead_export_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "run" / "huggingface" / "step-00000002.tmp-123"
    left.mkdir(parents=True)
    hf_export.Exporter(tiny_run(tmp_path / "run"), print)
    assert not left.exists()


# --- Tokenizers -----------------------------------------------------------------------------------


def import_and_step(tmp_path: Path, **data: Any) -> Path:
    """Imports a model and commits step 3 of it, trained with the settings `data`."""
    model_with_files("llama", tmp_path / "hf")
    run = tmp_path / "run"
    assert convert("import", tmp_path / "hf", run) == 0
    first = store.committed(run / "checkpoints")[0]
    shape = huggingface.read_shape(tmp_path / "hf")
    about = first.manifest | {
        "run": {"model": {"seq_length": data.pop("seq_length", 32)}, "data": data},
        "optimizer": "sgd",
    }
    for name in ("format", "iteration", "files", "sha256"):
        del about[name]
    about["state"] = about["state"] | {"iteration": 3}
    about |= {"counters": {}, "loss_scaler": {}}
    pieces = huggingface.import_pieces(tmp_path / "hf", shape)
    commit_pieces(run / "checkpoints", 3, pieces, about)
    return run


@pytest.mark.parametrize("kind", ["NullTokenizer", "HFTokenizer"])
def test_files_and_ids_survive_training(kind: str, tmp_path: Path) -> None:
    model = str(tmp_path / "hf") if kind == "HFTokenizer" else None
    run = import_and_step(tmp_path, tokenizer_type=kind, tokenizer_model=model)
    assert convert("export", run, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [0, 7] and config["pad_token_id"] == 3
    assert config["max_position_embeddings"] == 256, "the model's own, which is longer than SEQ"
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_files_are_found_from_a_run_that_was_loaded_from_the_import(tmp_path: Path) -> None:
    run = import_and_step(tmp_path, tokenizer_type="NullTokenizer", tokenizer_model=None)
    last = store.committed(run / "checkpoints")[0]
    load = {"checkpoint": {"load": str(run / "checkpoints")}}
    about = last.manifest | {"run": last.manifest["run"] | load}
    for name in ("format", "iteration", "files", "sha256"):
        del about[name]
    about["state"] = about["state"] | {"iteration": 5}
    shape = huggingface.read_shape(tmp_path / "hf")
    pieces = huggingface.import_pieces(tmp_path / "hf", shape)
    root = tmp_path / "other" / "checkpoints"
    commit_pieces(root, 5, pieces, about)
    assert convert("export", tmp_path / "other", tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_longer_sequence_is_the_models_length(tmp_path: Path) -> None:
    run = import_and_step(
        tmp_path, tokenizer_type="NullTokenizer", tokenizer_model=None, seq_length=512
    )
    assert convert("export", run, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512


def test_a_run_with_another_tokenizer_exports_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tokenizer(tmp_path / "other", "gpt2", ["zzzz yyyy xxxx naive code " * 30])
    run = import_and_step(tmp_path, tokenizer_type="HFTokenizer", tokenizer_model=other)
    assert convert("export", run, tmp_path / "out") == 0
    assert "the run's is exported" in capsys.readouterr().err
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "zzzz yyyy"
    assert out.encode(text) == AutoTokenizer.from_pretrained(other).encode(text)
    assert not (tmp_path / "out" / "generation_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos_token_id"] is None


def test_the_printed_command_has_length_and_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_with_files("llama", tmp_path / "hf")
    assert convert("import", tmp_path / "hf", tmp_path / "run") == 0
    words = capsys.readouterr().out.split()
    assert "SEQ=256" in words and "TOKENIZER_TYPE=HFTokenizer" in words
    assert f"TOKENIZER_MODEL={tmp_path / 'run' / 'huggingface-import'}" in words
    assert {"LR=2e-5", "MIN_LR=2e-6", "TRAIN_ITERS=1000", "DATA_FILE_LIST=LIST"} <= {*words}


def test_the_printed_command_names_data_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hugging_face_model("llama", tmp_path / "hf")  # 200 tokens
    for largest, status in ((199, 0), (200, 2)):
        with IndexedWriter(str(tmp_path / f"to{largest}"), np.dtype(np.uint16)) as writer:
            writer.add_document(np.arange(100, largest + 1))
        path = tmp_path / f"{largest}.txt"
        path.write_text(f"1 {tmp_path / f'to{largest}'}\n")
        run = tmp_path / f"run{largest}"
        assert convert("import", tmp_path / "hf", run, "--data", path) == status
        assert run.exists() == (status == 0)
        printed = capsys.readouterr()
        if status == 0:
            assert f"DATA_FILE_LIST={path}" in printed.out.split()
        else:
            assert "has id 200, outside the vocabulary [0, 200)" in printed.err

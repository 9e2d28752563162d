"""Megatron-DeepSpeed's checkpoints: every tensor and state as it was, or a refusal by name."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import store, torch_file
from megatron.model.registry import ARCHITECTURES
from tests.checkpoint.reference_checkpoint import (
    HIDDEN,
    VOCAB,
    Written,
    known,
    write,
    write_universal,
)
from tools import convert_hf

FORMS = {
    "tp1": Written(),
    "tp1-fp32": Written(dtype=torch.float32),
    "tp2-dp2": Written(tp=2, dp=2),
    "tp4-dp3": Written(tp=4, dp=3, zero=2),
    "pp2-dp2": Written(pp=2, dp=2),
    "pp2-tp2-tied": Written(pp=2, tp=2, dp=2, tied=True),
    "tied": Written(tied=True, tp=2),
    "zero3": Written(zero=3, dp=3),
    "zero3-tp2": Written(zero=3, dp=2, tp=2),
}


def imported(folder: Path, run: Path, *options: str) -> store.Checkpoint:
    assert convert_hf.main(["import", str(folder), str(run), *options]) == 0
    (checkpoint,) = store.committed(run / "checkpoints", pytest.fail)
    assert store.damage(checkpoint) == []
    return checkpoint


def require_equal(
    checkpoint: store.Checkpoint, values: dict[str, Any], *, states: bool = True, to: Any = None
) -> None:
    """Every parameter is what it was made from, its padding zero."""
    shape = convert_hf.ModelShape(**checkpoint.manifest["model"], seq_length=32)
    names = ARCHITECTURES["llama"].hugging_face_names(shape)
    reader = checkpoint.reader()
    assert sorted(names) == reader.names() and set(names.values()) == set(values["fp32"])
    kinds = {"weight": "fp32"} | (
        {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"} if states else {}
    )
    for ours, theirs in names.items():
        assert reader.states(ours) == list(kinds)
        for state, kind in kinds.items():
            wanted, value = values[kind][theirs], reader.whole(ours, state)
            wanted = wanted.to(to).float() if to else wanted
            assert torch.equal(value[: len(wanted)], wanted), (ours, state)
            assert not value[len(wanted) :].any()
        assert reader.scalars(ours) == ({"step": 5.0} if states else {})


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_and_state_is_taken(form: str, tmp_path: Path) -> None:
    run = FORMS[form]
    values = known(run.tied)
    write(tmp_path / "reference", run, values)
    checkpoint = imported(tmp_path / "reference", tmp_path / "run")
    require_equal(checkpoint, values)
    state = checkpoint.state()
    assert (state.iteration, state.consumed_samples, state.consumed_tokens) == (5, 40, 1280)
    assert checkpoint.manifest["optimizer"] == "adamw"
    assert checkpoint.manifest["model"]["vocab_size"] == VOCAB


@pytest.mark.parametrize("merged", [True, False])
def test_universal(merged: bool, tmp_path: Path) -> None:
    values = known()
    write_universal(tmp_path / "reference", Written(tp=2), values, merged=merged)
    require_equal(imported(tmp_path / "reference", tmp_path / "run"), values)


@pytest.mark.parametrize("form", ["tp2-dp2", "pp2-dp2"])
def test_weights_only_takes_the_model_files(form: str, tmp_path: Path) -> None:
    values = known()
    folder = write(tmp_path / "reference", FORMS[form], values)
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    checkpoint = imported(folder, tmp_path / "run", "--weights-only")
    require_equal(checkpoint, values, states=False, to=torch.bfloat16)
    assert checkpoint.manifest["optimizer"] is None and checkpoint.iteration == 5


def test_a_model_file_becomes_a_hugging_face_folder(tmp_path: Path) -> None:
    """As mds_to_hf.py, from `--mds_checkpoint .../mp_rank_00_model_states.pt`, in two commands."""
    folder = write(tmp_path / "reference", Written(), known())
    model, run = folder / "mp_rank_00_model_states.pt", tmp_path / "run"
    checkpoint = imported(model, run, "--weights-only")
    assert checkpoint.iteration == 5
    assert convert_hf.main(["export", str(run), str(tmp_path / "hf")]) == 0
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors"} <= files


def test_the_padding_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "reference", Written(), known())
    checkpoint = imported(tmp_path / "reference", tmp_path / "run", "--vocab-size", "256")
    assert checkpoint.manifest["model"]["vocab_size"] == 256
    assert torch.equal(
        checkpoint.reader().whole("0.weight")[VOCAB:], torch.full((56, HIDDEN), 0.01)
    )


def test_trackers_name_the_step(tmp_path: Path) -> None:
    values = known()
    for step in (10, 5):  # the tracker names the one that was written last
        write(tmp_path / "reference", Written(step=step), values)
    assert imported(tmp_path / "reference", tmp_path / "run").iteration == 5
    (tmp_path / "reference" / "latest").unlink()
    (tmp_path / "reference" / "latest_checkpointed_iteration.txt").unlink()
    assert imported(tmp_path / "reference", tmp_path / "newest").iteration == 10
    (tmp_path / "reference" / "latest").write_text("global_step7")
    refused(tmp_path / "reference", "names global_step7, which is not there")


def refused(folder: Path, *words: str) -> None:
    """The import ends with 2, says `words`, and leaves no checkpoint."""
    run, said = folder.parent / "refused", io.StringIO()
    with contextlib.redirect_stderr(said):
        status = convert_hf.main(["import", str(folder), str(run)])
    assert status == 2, said.getvalue()
    for word in words:
        assert word in said.getvalue()
    assert store.steps(run / "checkpoints") == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def rewrite(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def of_another_step(path: Path) -> None:
    rewrite(path, lambda content: content.update(iteration=7))


def a_changed_weight(path: Path) -> None:
    def change(content: Any) -> None:
        content["module"]["language_model"]["encoder"]["final_layernorm.weight"] += 0.5

    rewrite(path, change)


def a_bias(path: Path) -> None:
    def change(content: Any) -> None:
        content["module"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.bias"] = (
            torch.zeros(HIDDEN)
        )

    rewrite(path, change)


def without_moments(path: Path) -> None:
    def change(content: Any) -> None:
        del content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"]

    rewrite(path, change)


def without_mappings(path: Path) -> None:
    rewrite(path, lambda content: content["optimizer_state_dict"].pop("param_slice_mappings"))


MODEL, OPTIMIZER = "mp_rank_01_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
DAMAGE: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "a cut model file": (MODEL, cut, (MODEL, "cannot be read")),
    "a cut optimizer file": (OPTIMIZER, cut, (OPTIMIZER, "cannot be read")),
    "a model file is gone": ("mp_rank_00_model_states.pt", Path.unlink, ("mp_rank 00 is missing",)),
    "the last model file is gone": (MODEL, Path.unlink, ("TP=2 x PP=1 = 2 model files, 1 are",)),
    "an optimizer file is gone": (
        OPTIMIZER,
        Path.unlink,
        ("was written by 2 data-parallel ranks, but 1 files", "--weights-only"),
    ),
    "text": (MODEL, lambda path: path.write_text("hello"), (MODEL, "cannot be read")),
    "a list": (MODEL, lambda path: torch.save([1], path), (MODEL, "holds a list")),
    "mixed steps": (MODEL, of_another_step, ("iteration 5", "of 7", "mixed")),
    "another model's weights": (
        "mp_rank_00_model_states.pt",
        a_changed_weight,
        ("final_layernorm.weight", "files of two steps are mixed"),
    ),
    "a bias": (MODEL, a_bias, ("dense_4h_to_h.bias",)),
    "no moments": (OPTIMIZER, without_moments, (OPTIMIZER, "no exp_avg_sq", "--weights-only")),
    "no mappings": (OPTIMIZER, without_mappings, (OPTIMIZER, "--weights-only")),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound") / "reference"
    write(root, FORMS["tp2-dp2"], known())
    return root


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_and_mixed_files_are_refused_by_name(
    what: str, sound: Path, tmp_path: Path
) -> None:
    name, damage, words = DAMAGE[what]
    shutil.copytree(sound, tmp_path / "reference")
    damage(tmp_path / "reference" / "global_step5" / name)
    refused(tmp_path / "reference", *words)


def test_replicas_that_differ_are_named(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sound, tmp_path / "reference")
    a_changed_weight(tmp_path / "reference" / "global_step5" / MODEL)
    require_equal(imported(tmp_path / "reference", tmp_path / "run"), known())
    said = capsys.readouterr().err
    assert "final_layernorm.weight: weight differs between tensor-parallel ranks" in said


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"swiglu": False}, "swiglu=False"),
        ({"normalization": "layernorm"}, "normalization='layernorm'"),
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"num_layers": 5}, "model.layers.4"),
        ({"ffn_hidden_size": 100}, "is (64, 96), its arguments say (64, 100)"),
        ({"num_attention_heads": 6}, "query_key_value.weight"),
        ({"optimizer": "sophiag"}, "--optimizer sophiag"),
    ],
)
def test_what_is_no_model_of_ours_is_refused(args: Any, word: str, tmp_path: Path) -> None:
    write(tmp_path / "reference", Written(args=args), known())
    refused(tmp_path / "reference", word)


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, *command: Any) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return self.command


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path, mark = tmp_path / "file.pt", tmp_path / "ran"
    torch.save({"a": Trap(os.system, (f"touch {mark}",))}, path)
    with pytest.raises(ValueError, match="blocked"):
        torch_file.read(path)
    torch.save({"a": Trap(shutil.copyfile, (str(path), str(mark))), "b": torch.ones(2)}, path)
    content = torch_file.read(path)
    assert type(content["a"]) is torch_file.Inert and content["b"].sum() == 2
    assert not mark.exists()

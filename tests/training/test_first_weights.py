"""FINETUNE, NO_LOAD_OPTIM, and LOAD of a folder that holds no checkpoints of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.checkpoint.store import step_folder, steps
from megatron.config.errors import ConfigError, MissingCheckpoint
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig
from megatron.training.resume import find_source, resume
from tests.checkpoint.hugging_face_models import hugging_face_model
from tests.checkpoint.reference_checkpoint import Written, known, write, write_universal
from tests.equivalence import front
from tests.faults.harness import digests
from tests.spawn import run as on_ranks
from tests.training.test_resume import with_settings
from tests.training.test_trainer import Adder, config, trained

SOURCE = sum(range(24))  # what six steps of four samples add up to


@pytest.fixture
def source(tmp_path: Path) -> RunConfig:
    """A run of six steps that saved every two."""
    run = config(tmp_path / "source", 6, save=2)
    trained(run, Adder())
    return run


def finetuned(source: RunConfig, folder: Path, count: int = 4, **settings: Any) -> RunConfig:
    """A run that begins with the weights of `source`."""
    load = str(source.checkpoint_folder)
    return with_settings(
        config(folder, count, save=2), checkpoint__finetune=True, checkpoint__load=load, **settings
    )


def test_a_new_run_with_the_weights_of_another(source: RunConfig, tmp_path: Path) -> None:
    before = digests(source.run_folder)
    engine = Adder()
    outcome, _ = trained(finetuned(source, tmp_path / "new"), engine)
    assert outcome.state.iteration == 4 and outcome.state.consumed_samples == 16
    assert engine.trained == [*range(16)], "its own samples, from the first"
    assert engine.total == SOURCE + sum(range(16))
    assert steps(tmp_path / "new" / "checkpoints") == [4, 2]
    assert digests(source.run_folder) == before, "the source stays as it was"


def test_the_same_command_again_goes_on(source: RunConfig, tmp_path: Path) -> None:
    whole, parts = Adder(), (Adder(), Adder())
    trained(finetuned(source, tmp_path / "whole", 8), whole)
    trained(finetuned(source, tmp_path / "new", 4), parts[0])
    source.checkpoint_folder.rename(tmp_path / "gone")  # it was for the beginning only
    trained(finetuned(source, tmp_path / "new", 8), parts[1])
    assert parts[1].trained == [*range(16, 32)] and parts[1].total == whole.total


def test_load_beside_checkpoints_that_did_not_begin_with_it(
    source: RunConfig, tmp_path: Path
) -> None:
    plain = config(tmp_path / "plain", 2)
    trained(plain, Adder())
    load = {"checkpoint__load": str(source.checkpoint_folder)}
    with pytest.raises(ConfigError, match=r"step-00000002, which began without LOAD: unset LOAD"):
        resume(with_settings(plain, **load), Adder())
    begun = with_settings(config(tmp_path / "begun", 8), **load)
    trained(begun, Adder())
    assert resume(begun, Adder()).iteration == 8, "its own, not LOAD's 6"
    other = with_settings(begun, checkpoint__load=str(plain.checkpoint_folder))
    with pytest.raises(ConfigError, match=r"began with LOAD=\S+source/checkpoints: unset LOAD"):
        resume(other, Adder())
    for step in steps(begun.checkpoint_folder):
        (step_folder(begun.checkpoint_folder, step) / "manifest.json").write_text("")
    with pytest.raises(MissingCheckpoint, match=r"every checkpoint in .*begun.* is damaged"):
        resume(begun, Adder())


def test_a_run_that_began_otherwise_is_not_taken_for_it(source: RunConfig, tmp_path: Path) -> None:
    plain = config(tmp_path / "plain", 2)
    trained(plain, Adder())
    with pytest.raises(ConfigError, match=r"was started without FINETUNE: set another RUN_NAME"):
        trained(finetuned(source, tmp_path / "plain"), Adder())
    trained(finetuned(source, tmp_path / "new"), Adder())
    with pytest.raises(ConfigError, match=r"began with the weights of .*source"):
        trained(finetuned(plain, tmp_path / "new"), Adder())


def test_damage_is_never_a_new_beginning(source: RunConfig, tmp_path: Path) -> None:
    new = finetuned(source, tmp_path / "new")
    trained(new, Adder())
    for step in (2, 4):
        (step_folder(new.checkpoint_folder, step) / "manifest.json").write_text("")
    with pytest.raises(MissingCheckpoint, match=r"every checkpoint in .*new.* is damaged"):
        trained(new, Adder())
    for step in (2, 4, 6):
        (step_folder(source.checkpoint_folder, step) / "manifest.json").unlink()
    with pytest.raises(MissingCheckpoint, match=r"every checkpoint in .*source.* is damaged"):
        trained(finetuned(source, tmp_path / "newer"), Adder())


def test_another_shape_is_refused_and_another_theta_said(
    source: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = finetuned(source, tmp_path / "new", model__vocab_size=128, model__num_layers=2)
    with pytest.raises(ConfigError, match=r"NLAYERS 3 -> 2, VOCAB_SIZE 100 -> 128; set these"):
        trained(new, Adder())
    with caplog.at_level(logging.WARNING):
        trained(finetuned(source, tmp_path / "new", model__rope_theta=5e5), Adder())
    assert "FINETUNE: ROPE_THETA 50000.0 -> 500000.0 since" in caplog.text


def command(**variables: str) -> list[str]:
    """The warnings and notes of a configuration; ConfigError where it is refused."""
    resolved = resolve({**front.VARIABLES, **variables}, [], Site())
    return resolved.warnings + resolved.notes


def test_settings_that_cannot_be_are_refused_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"FINETUNE=1 begins with the weights of LOAD, which is"):
        command(FINETUNE="1")
    with pytest.raises(ConfigError, match=r"this run saves to. Set another RUN_NAME"):
        command(FINETUNE="1", LOAD="runs/a/../a/checkpoints", RUN_NAME="a")
    with pytest.raises(ConfigError, match=r"Set another SAVE"):
        command(FINETUNE="1", LOAD=str(tmp_path), SAVE=str(tmp_path))
    lines = command(FINETUNE="1", LOAD="x", NO_LOAD_OPTIM="1", NO_LOAD_RNG="1")
    assert any("NO_LOAD_OPTIM has no effect with FINETUNE" in line for line in lines)
    assert any("NO_LOAD_RNG leaves nothing out" in line for line in lines)


def a_run_folder(folder: Path) -> None:
    trained(config(folder, 2), Adder())


def a_step(folder: Path) -> None:
    trained(config(folder.parent / "run", 2), Adder())
    step_folder(folder.parent / "run" / "checkpoints", 2).rename(folder)


def files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return make


IMPORT = "python3 tools/convert_hf.py import {folder} RUN"
FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "reference": (lambda folder: write(folder, Written(), known()), IMPORT),
    "a step of it": (files("layer_01-model_00-model_states.pt"), IMPORT),
    "universal": (lambda folder: write_universal(folder, Written(), known()), IMPORT),
    "Hugging Face": (lambda folder: hugging_face_model("llama", folder), "or make it the first"),
    "Megatron-LM": (files("iter_0000100/mp_rank_00/model_optim_rng.pt"), "Megatron-LM"),
    "DCP": (files(".metadata", "__0_0.distcp"), "distributed checkpoint of torch"),
    "torchtitan": (files("step-1000/.metadata", "step-1000/__0_0.distcp"), "of torch or Megatron"),
    "Lightning": (files("last.ckpt"), "checkpoints of Lightning"),
    "a run": (a_run_folder, "its checkpoints are in {folder}/checkpoints"),
    "one step": (a_step, "give the folder above it"),
    "files": (files("a", "b", "c", "d", "e"), "holds no checkpoint, but a, b, c, d and 1 more"),
    "empty": (Path.mkdir, "is empty. To begin with new weights unset LOAD"),
    "missing": (lambda folder: None, "does not exist"),
    "a file": (Path.touch, "is a file"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_load_of_something_else_is_never_a_fresh_start(what: str, tmp_path: Path) -> None:
    make, advice = FOREIGN[what]
    folder, engine = tmp_path / "other", Adder()
    make(folder)
    run = with_settings(config(tmp_path / "new", 2), checkpoint__load=str(folder))
    with pytest.raises(MissingCheckpoint) as refused:
        resume(run, engine)
    assert refused.value.exit_status == 4
    assert advice.format(folder=folder) in str(refused.value) and str(folder) in str(refused.value)


def test_nor_is_saving_into_somebody_elses_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "old", Written(), known())
    run = with_settings(config(tmp_path / "new", 2), checkpoint__save=str(tmp_path / "old"))
    with pytest.raises(MissingCheckpoint, match=r"where checkpoints are saved, holds .*DeepSpeed"):
        resume(run, Adder())


def test_its_own_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    run = config(tmp_path / "new", 2)
    own = with_settings(run, checkpoint__load=str(run.checkpoint_folder))
    assert resume(own, Adder()).iteration == 0
    needed = with_settings(own, checkpoint__exit_on_missing_checkpoint=True)
    with pytest.raises(MissingCheckpoint, match="--exit-on-missing-checkpoint"):
        resume(needed, Adder())


ADAMW = {"OPT": "adamw", "LR": "0.01", "WEIGHT_DECAY": "0.1"}
LAYOUTS: dict[str, dict[str, str]] = {
    "tp1": {},
    "tp2": {"TP": "2"},
    "tp2-pp2": {"TP": "2", "PP": "2"},
    "dp2-zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
    "dp2-zero2": {"WORLD_SIZE": "2", "ZERO_STAGE": "2"},
    "schedule-free": {"OPT": "adamwschedulefree"},
    "muon": {"OPT": "muon", "TP": "2"},
}


def curves(variables: dict[str, str], first: int) -> tuple[int, front.Curve]:
    """One start: the step it begins after, and two steps on the samples of `first`, saved."""
    run, control = front.run_config(variables), front.make_control()
    source = find_source(run, control)
    engine = front.build(run, source=source)
    state = resume(run, engine, None, control, source)
    curve = front.steps(run, engine, first, first + 2)
    front.save(run, engine, state.iteration + 2, control)
    return state.iteration, curve


@pytest.mark.parametrize(
    "layout",
    ["tp1", *(pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS if name != "tp1")],
)
def test_bits_of_weights_and_of_a_new_optimizer(layout: str, tmp_path: Path) -> None:
    """FINETUNE and NO_LOAD_OPTIM give the same two steps; the second start goes on."""
    variables = {**ADAMW, **LAYOUTS[layout]}
    world = front.world(variables)

    def start(folder: str, first: int, **more: str) -> tuple[int, front.Curve]:
        settings = {**variables, "RUN_DIR": str(tmp_path / folder), **more}
        results = on_ranks(curves, world, settings, first)
        assert all(result == results[0] for result in results)
        return results[0]

    assert start("source", 0)[0] == 0
    load = {"LOAD": str(tmp_path / "source" / "checkpoints")}
    resumed = start("resumed", 2, **load)
    new = start("finetuned", 2, FINETUNE="1", **load)
    dropped = start("dropped", 2, NO_LOAD_OPTIM="1", **load)
    assert (resumed[0], new[0], dropped[0]) == (2, 0, 2)
    assert new[1] == dropped[1], "the same weights, the same new optimizer"
    if layout != "schedule-free":  # which trains at another point than it evaluates
        assert new[1][0] == resumed[1][0], "the weights are the checkpoint's, bit for bit"
    assert new[1][1] != resumed[1][1], "the optimizer is not"
    again = start("finetuned", 4, FINETUNE="1", **load)
    own = {"LOAD": str(tmp_path / "dropped" / "checkpoints"), "NO_LOAD_OPTIM": "1"}
    assert again[0] == 2 and again[1] == start("dropped", 4, **own)[1], "its states are taken"
    assert start("resumed", 4, **load)[0] == 4, "a job that starts again keeps its own steps"


def loss_of(variables: dict[str, str]) -> tuple[int, front.Curve]:
    run, control = front.run_config(variables), front.make_control()
    source = find_source(run, control)
    engine = front.build(run, source=source)
    return resume(run, engine, None, control, source).iteration, front.steps(run, engine, 0, 1)


@pytest.mark.parametrize("layout", ["tp2-pp2", pytest.param("dp2-zero3", marks=pytest.mark.long)])
def test_a_hugging_face_folder_as_it_is(layout: str, tmp_path: Path) -> None:
    hugging_face_model("llama", tmp_path / "hf")
    variables = {
        **LAYOUTS[layout], "RUN_DIR": str(tmp_path / "run"), "FINETUNE": "1",
        "LOAD": str(tmp_path / "hf"), "ROPE_THETA": "10000",
    }  # fmt: skip
    results = on_ranks(loss_of, front.world(variables), variables)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    batch = front.samples(front.run_config(variables), 0)
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    for step, ((loss, _),) in results:
        assert step == 0 and loss == pytest.approx(expected.item(), abs=1e-5)


def test_a_hugging_face_folder_of_another_model(tmp_path: Path) -> None:
    hugging_face_model("llama", tmp_path / "hf")
    run = with_settings(
        config(tmp_path / "new", 2),
        checkpoint__load=str(tmp_path / "hf"),
        checkpoint__finetune=True,
    )
    with pytest.raises(ConfigError, match=r"NLAYERS 4 -> 3.*VOCAB_SIZE 200 -> 100"):
        resume(run, Adder())
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"LOAD=.*config\.json"):
        resume(run, Adder())

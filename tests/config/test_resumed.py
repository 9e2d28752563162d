"""--resume RUN: the same configuration as before, with the changes given beside it, each said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.config.presets import PRESETS
from megatron.config.resolve import Resolved, Site
from megatron.config.schema import RunConfig, read_run
from megatron.launch import starts
from megatron.launch.site import find_location
from megatron.launch.site import site as site_of
from tests.config.helpers import AURORA, configured, resolved, started


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resumed(run: str | Path, *argv: str, site: Site | None = None, **environ: object) -> Resolved:
    return resolved("--resume", str(run), *argv, site=site, **environ)


def said(found: Resolved) -> str:
    """What a start says that it changes."""
    (note,) = (note for note in found.notes if note.startswith("resumes "))
    return note.partition("; changed: ")[2]


COMMANDS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("--num-layers", "8", "--bf16", "--split", "90,5,5"), {"GLOBAL_BATCH": 32, "TP": 2}),
    (("--exit-on-missing-checkpoint", "--init-method-std", "0.01"), {"MICRO_BATCH": 3, "GAS": 5}),
    ((), {"GLOBAL_BATCH": 24, "GAS": 4, "WORLD_SIZE": 2, "LR_DECAY_ITERS": 150}),
    ((), {"TRAIN_TOKENS": 10**6, "SEQ": 256, "TRAIN_RANGE_TO_SKIP": "30 40 10 20"}),
    ((), {"TRAIN_TOKENS": 2048 * 50, "TRAIN_ITERS": 50, "RUN_NAME": "both"}),
    ((), {"TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": 500, "DATA_FILE_LIST": "my.txt"}),
    ((), {"TOKENIZER_MODEL": "gpt2", "VOCAB_SIZE": 300, "DATA_FILE_LIST": "my.txt"}),
    ((), {"MODEL_ARCH": "SmolLM2-360M", "DATA_FILE_LIST": "my.txt", "PP": 2, "TRAIN_ITERS": 9}),
    ((), {"MODEL_ARCH": "Llama-3.2-1B", "DATA_FILE_LIST": "my.txt", "TRAIN_ITERS": 9}),
    ((), {"CKPT_DIR": "elsewhere", "LOAD": "another", "SAVE_INTERVAL": 7, "RUN_DIR": "mine"}),
    ((), {"ROPE_SCALING": "llama3", "HEAD_DIM": 16, "OPT": "sgd", "COMPILE": "off"}),
    (
        (),
        {
            "GLOBAL_BATCH": 8,
            "MICRO_BATCH": 2,
            "RAMPUP_BATCH_SIZE": "2 2 12",
            "TRAIN_SAMPLES": 99,
            "LR_WARMUP_TOKENS": 640,
            "LR_DECAY_SAMPLES": 90,
        },
    ),
    ((), {"SPIKE_POLICY": "skip", "KEEP_LAST": 3, "RETRIES": 2, "HANG_TIMEOUT": 0}),
]


@pytest.mark.parametrize(("argv", "environ"), COMMANDS)
def test_resume_alone_is_the_same_run(argv: tuple[str, ...], environ: dict[str, Any]) -> None:
    before = started(*argv, **environ)
    again = resumed(before.run_folder)
    assert read_run(before.run_folder / "run.json") == _real(again.run)
    assert said(again) == "nothing"
    # And a resumed run can be resumed.
    with starts.pending(again, {}) as config:
        starts.accept(config, again.run.run_folder)
    twice = resumed(before.run_folder)
    assert twice.run == again.run
    assert said(twice) == "nothing"


def _real(run: RunConfig) -> RunConfig:
    values = run.to_dict()
    values["log"]["dry_run"] = False
    return RunConfig.from_dict(values)


@pytest.mark.parametrize("arch", PRESETS)
def test_every_preset_on_a_machine(arch: str) -> None:
    before = started(site=AURORA, MODEL_ARCH=arch, RUN_NAME="x")
    assert read_run("runs/x/run.json") == _real(resumed("x", site=AURORA).run)
    assert before.machine == "aurora"


def test_the_run_is_named_by_folder_or_name() -> None:
    started(RUN_NAME="x")
    for name in ("x", "runs/x", "runs/x/", str(Path("runs/x").absolute())):
        assert resumed(name).run.run_folder == Path("runs/x")
    assert resolved(RESUME="x").run.checkpoint.run_name == "x"


def test_a_run_that_was_moved_stays_where_it_is() -> None:
    started(RUN_NAME="x", CKPT_DIR="saved")
    Path("runs/x").rename("moved")
    found = resumed("moved")
    assert found.run.run_folder == Path("moved")
    assert found.run.checkpoint_folder == Path("saved")
    assert said(found) == "nothing"


def test_a_preset_that_changed_since_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = started(RUN_NAME="x")
    monkeypatch.setitem(PRESETS["debug"].values, "LR", 0.7)  # type: ignore[arg-type]
    monkeypatch.setitem(PRESETS["debug"].values, "MICRO_BATCH", 4)  # type: ignore[arg-type]
    assert configured().optimizer.learning_rate == 0.7
    assert resumed("x").run.to_dict()["optimizer"] == before.to_dict()["optimizer"]
    assert resumed("x").run.to_dict()["train"] == before.to_dict()["train"]
    assert resumed("x", MICRO_BATCH=8).run.train.micro_batch_size == 8


@pytest.mark.parametrize(
    ("argv", "environ", "changes"),
    [
        ((), {"LR": "1e-4", "MIN_LR": 0}, "LR 0.003 -> 0.0001, MIN_LR 0.0003 -> 0"),
        (("--lr", "1e-3"), {"LR": "1e-4"}, "LR 0.003 -> 0.001"),
        ((), {"NLAYERS": 3}, "nothing"),  # as it was
        ((), {"TRAIN_RANGE_TO_SKIP": "90 95"}, "TRAIN_RANGE_TO_SKIP unset -> 90-95"),
        ((), {"SAVE_INTERVAL": 3, "LOAD": "x"}, "LOAD unset -> x, SAVE_INTERVAL 100 -> 3"),
        (
            (),
            {"TRAIN_ITERS": 400},
            "TRAIN_ITERS 200 -> 400, TRAIN_TOKENS 409600 -> 819200 (TRAIN_ITERS x GLOBAL_BATCH x "
            "SEQ), LR_DECAY_ITERS 200 -> 400 (TRAIN_ITERS)",
        ),
        (
            (),
            {"WORLD_SIZE": 4},
            "WORLD_SIZE 1 -> 4, MICRO_BATCH 16 -> 4 (largest divisor of GLOBAL_BATCH / DP up to "
            "16), NGPU_PER_HOST 1 -> 4 (WORLD_SIZE / NHOSTS)",
        ),
        (
            (),
            {"GAS": 4},
            "MICRO_BATCH 16 -> 4 (GLOBAL_BATCH / (GRAD_ACC_STEPS x DP)), GRAD_ACC_STEPS 1 -> 4",
        ),
    ],
)
def test_changes_are_taken_and_said(
    argv: tuple[str, ...], environ: dict[str, Any], changes: str
) -> None:
    started(RUN_NAME="x", NLAYERS=3)
    assert said(resumed("x", *argv, **environ)) == changes


def test_the_global_batch_stays_until_it_is_changed() -> None:
    started(RUN_NAME="x", WORLD_SIZE=4, MICRO_BATCH=2, GAS=3)  # 24
    for environ in ({"WORLD_SIZE": 2}, {"TP": 2}, {"GAS": 2}, {"MICRO_BATCH": 1}, {"PP": 2}):
        train = resumed("x", **environ).run.train
        assert train.global_batch_size == 24, environ
    assert resumed("x", GLOBAL_BATCH=8).run.train.global_batch_size == 8
    with pytest.raises(ConfigError, match="GLOBAL_BATCH=24"):
        resumed("x", MICRO_BATCH=1, GAS=1)


def test_steps_and_tokens_stand_in_for_each_other() -> None:
    started(RUN_NAME="steps", TRAIN_ITERS=50)
    assert resumed("steps", TRAIN_TOKENS=2048 * 7).run.train.train_iters == 7
    started(RUN_NAME="tokens", TRAIN_TOKENS=2048 * 50)
    assert resumed("tokens", TRAIN_ITERS=7).run.train.train_tokens == 2048 * 7
    assert resumed("tokens", GLOBAL_BATCH=32).run.train.train_iters == 25


def test_one_of_several_ways_to_give_a_length_takes_the_place_of_another() -> None:
    before = started(GLOBAL_BATCH=8, TRAIN_SAMPLES=800, LR_WARMUP_ITERS=10, LR_DECAY_SAMPLES=400)
    assert (before.train.train_iters, before.optimizer.lr_warmup_fraction) == (100, 0.2)
    longer = resumed(before.run_folder, TRAIN_ITERS=150).run
    assert (longer.train.train_iters, longer.train.train_samples) == (150, None)
    assert (longer.optimizer.lr_decay_iters, longer.optimizer.lr_warmup_fraction) == (50, 0.2)
    other = resumed(before.run_folder, LR_WARMUP_FRAC=0.5, LR_DECAY_ITERS=80).run.optimizer
    assert (other.lr_warmup_fraction, other.lr_decay_iters, other.lr_warmup_iters) == (
        0.5,
        80,
        None,
    )


def test_a_search_does_not_resume() -> None:
    before = started(TRAIN_ITERS=9)
    with pytest.raises(ConfigError, match="LR_FINDER searches from step 1"):
        resumed(before.run_folder, LR_FINDER=1)


def test_another_job_has_other_hosts() -> None:
    started(site=Site("aurora", True, 2, 12), MODEL_ARCH="debug", RUN_NAME="x")
    more = resumed("x", site=Site("aurora", True, 4, 12)).run
    assert (more.parallel.world_size, more.launch.num_hosts) == (48, 4)
    here = resumed("x", site=Site(), WORLD_SIZE=1).run
    assert (here.parallel.world_size, here.launch.devices_per_host) == (1, 1)
    assert here.data.data_file_list == more.data.data_file_list
    assert here.train.global_batch_size == more.train.global_batch_size == 24 * 16


def test_hosts_that_its_user_gave_stay(here: Path) -> None:
    (here / "hosts").write_text("n1\nn2\nn3\n")
    started(RUN_NAME="x", HOSTFILE="hosts", NHOSTS=2, WORLD_SIZE=2)
    environ = {"RESUME": "x"}
    location = find_location(environ)
    assert location.job.hosts == ("n1", "n2", "n3")
    assert site_of(environ, (), location).num_hosts == 2
    assert site_of({**environ, "NHOSTS": "1"}, (), location).num_hosts == 1
    (here / "others").write_text("n9\n")
    assert find_location(environ, ["--hostfile", "others"]).job.hosts == ("n9",)


def test_a_run_of_an_older_version(here: Path) -> None:
    """It lacks a section and fields; those that are no longer known are left."""
    before = started(RUN_NAME="x", SEED=7)
    record = json.loads((here / "runs/x/run.json").read_text())
    del record["config"]["stability"], record["config"]["checkpoint"]["async_save"]
    del record["config"]["checkpoint"]["resume"], record["config"]["launch"]["retries"]
    record["config"]["train"]["forgotten"] = 3
    (here / "runs/x/run.json").write_text(json.dumps(record))
    found = resumed("x")
    assert _real(found.run) == _real(before)
    assert said(found) == "nothing"
    del record["sources"]
    (here / "runs/x/run.json").write_text(json.dumps(record))
    assert _real(resumed("x").run) == _real(before)


def test_what_is_no_run(here: Path) -> None:
    started(RUN_NAME="x")
    (here / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(ConfigError) as refused:
            resumed(name)
        assert f"--resume={name} is not a run" in str(refused.value)
        assert "Runs here: x" in str(refused.value)
    with pytest.raises(ConfigError, match="RESUME=nowhere is not a run"):
        find_location({"RESUME": "nowhere"})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"config": 3}', '{"config": {}, "sources": 3}',
     '{"config": {"train": {"seed": "seven"}}}', '{"config": {"train": {"train_iters": true}}}',
     '{"config": {"train": {"seed": -1}}}', '{"config": {"train": {"dtype": "int8"}}}'],
)  # fmt: skip
def test_a_file_that_is_no_record(here: Path, text: str) -> None:
    (here / "runs/x").mkdir(parents=True)
    (here / "runs/x/run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"runs/x/run\.json|no value|GLOBAL") as refused:
        resumed("x")
    assert "run.json" in str(refused.value)


@pytest.mark.parametrize("environ", [{"RUN_NAME": "y"}, {"RUN_DIR": "y"}])
def test_another_folder_contradicts_it(environ: dict[str, str]) -> None:
    started(RUN_NAME="x")
    with pytest.raises(ConfigError, match=f"unset {next(iter(environ))}"):
        resumed("x", **environ)
    assert resumed("x", RUN_NAME="x").run.run_folder == Path("runs/x")
    assert resumed("x", RUN_DIR="runs/x").run.run_folder == Path("runs/x")


def test_another_preset_brings_its_own_values() -> None:
    started(RUN_NAME="x", NLAYERS=5)
    run = resumed("x", MODEL_ARCH="SmolLM2-135M").run
    assert (run.model.hidden_size, run.model.num_layers) == (576, 5)
    assert run.run_folder == Path("runs/x")

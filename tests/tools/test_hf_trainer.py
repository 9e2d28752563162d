"""tools/hf_trainer.py: its flags, its samples, and its steps beside ours."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.config.errors import ConfigError
from megatron.launch.ranks import find_ranks
from megatron.training.metrics_file import read
from tests.e2e.front_door import ROOT, TINY, environment, train
from tools import compare_runs, hf_trainer
from tools.hf_training.hf_flags import divide
from tools.hf_training.hf_samples import StreamedText, packed

PUBLISHED = (
    "--streaming --dataset_name=stanfordnlp/imdb --model_name_or_path FOLDER --bf16=true "
    "--do_train=true --do_eval=true --report-to=wandb --logging-steps=1 "
    "--include-tokens-per-second=true --max-steps=100 --include-num-input-tokens-seen=true "
    "--optim=adamw_torch --logging-first-step --include-for-metrics=inputs,loss "
    "--max-eval-samples=50 --per_device_train_batch_size=1 --per_device_eval_batch_size=1 "
    "--block_size=8192 --gradient_checkpointing=true --fsdp=auto_wrap --output_dir=OUT"
)
"""The arguments of a published comparison."""


def test_the_published_command_is_taken() -> None:
    flags = divide(PUBLISHED.split())
    assert flags.settings == {
        "DTYPE": "bf16", "WANDB_MODE": "online", "LOG_INTERVAL": "1", "TRAIN_ITERS": "100",
        "OPT": "adamw", "MICRO_BATCH": "1", "SEQ": "8192", "USE_ACTIVATION_CHECKPOINTING": "1",
        "RUN_DIR": "OUT",
    }  # fmt: skip
    assert flags.own == {
        "streaming": "", "dataset_name": "stanfordnlp/imdb", "model_name_or_path": "FOLDER",
        "max_eval_samples": "50", "fsdp": "auto_wrap",
    }  # fmt: skip
    assert flags.fsdp and flags.rest == []


def test_our_flags_go_on_and_wandb_is_off_unless_it_is_asked_for() -> None:
    flags = divide(["--eval-iters", "3", "--learning_rate", "1e-3", "--fsdp=false"])
    assert flags.rest == ["--eval-iters", "3"] and not flags.fsdp
    found = hf_trainer.settings(flags, {"WANDB_MODE": "online", "SEQ": "64"})
    assert found == {"WANDB_MODE": "disabled", "SEQ": "64", "LR": "1e-3"}
    asked = hf_trainer.settings(divide(["--report-to=wandb", "--fsdp"]), {})
    assert asked == {"WANDB_MODE": "online", "ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim=lion"], "--optim=lion: one of adamw_torch"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--max_steps", "--bf16"], "--max_steps needs a value"),
    ],
)
def test_what_has_no_counterpart_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        divide(words)


def test_ranks_of_any_launcher_find_one_another() -> None:
    """accelerate reads torchrun's names; mpiexec has others."""
    environ = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
               "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29000"}  # fmt: skip
    assert hf_trainer.torch_variables(find_ranks(environ), environ) == {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29000",
    }  # fmt: skip


class Letters:
    """One token a character."""

    eod = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_texts_are_packed_without_a_gap() -> None:
    """Samples of 4 predictions: inputs follow one another, each label is the next input."""
    samples = list(packed(["abcde", "fg", "hijk"], Letters(), 4))
    whole = [*map(ord, "abcde"), 0, *map(ord, "fg"), 0, *map(ord, "hijk"), 0]
    inputs = torch.cat([sample["input_ids"] for sample in samples]).tolist()
    labels = torch.cat([sample["labels"] for sample in samples]).tolist()
    assert inputs == whole[: len(inputs)] and labels == whole[1 : len(labels) + 1]
    assert all(len(sample["input_ids"]) == 4 for sample in samples) and len(samples) == 3


def test_a_file_is_streamed_for_ever_and_what_is_none_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcde"}\n')
    found = list(StreamedText(str(path), Letters(), 4, first=1, count=2))
    stream = "abcde\0" * 4
    for number, sample in enumerate(found, 1):
        assert sample["input_ids"].tolist() == [ord(c) for c in stream[4 * number : 4 * number + 4]]
    with pytest.raises(ConfigError, match="cannot be read"):
        next(iter(StreamedText(str(tmp_path / "none"), Letters(), 4, 0, 1)))
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(ConfigError, match=r"a file is one of \.jsonl"):
        next(iter(StreamedText(str(tmp_path / "a.csv"), Letters(), 4, 0, 1)))


def test_without_accelerate_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hf_trainer, "NEEDED", {"no_such_package": "1.0"})
    assert hf_trainer.main(["--max_steps=1"], {}) == 2
    assert "pip install no_such_package==1.0" in capsys.readouterr().err


def start(folder: Path, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """The tool as a user starts it, alone or behind torchrun."""
    program = [str(ROOT / "tools" / "hf_trainer.py"), f"--output_dir={folder}", *words]
    launcher = (
        []
        if ranks == 1
        else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    )
    return subprocess.run(
        [sys.executable, *launcher, *program],
        env=environment({**TINY, "TRAIN_ITERS": "3"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_its_steps_are_ours(tmp_path: Path) -> None:
    """From the same weights: losses, norms and the evaluation."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    result = train({"RUN_DIR": str(ours), "TRAIN_ITERS": "3"})
    assert result.returncode == 0, result.stdout
    found = start(theirs)
    assert found.returncode == 0, found.stdout
    words = [str(ours), str(theirs)]
    assert compare_runs.main([*words, "--assert-equal", "1e-5"]) == 0
    a, b = (
        [r for r in read(run / "metrics.jsonl") if r["event"] == "eval"] for run in (ours, theirs)
    )
    assert [r["iteration"] for r in a] == [r["iteration"] for r in b] == [3]
    for key in a[0].keys() & {"loss", "perplexity", "accuracy", "samples"}:
        assert a[0][key] == pytest.approx(b[0][key], rel=1e-5)
    record = json.loads((theirs / "run.json").read_text())
    assert record["provenance"]["trainer"] == "transformers.Trainer"
    again = start(theirs)
    assert again.returncode == 2 and "choose another --output_dir" in again.stdout


@pytest.mark.long
def test_fsdp_on_two_ranks_takes_our_steps(tmp_path: Path) -> None:
    two, sharded = tmp_path / "two", tmp_path / "sharded"
    result = train({"RUN_DIR": str(two), "TRAIN_ITERS": "3", "WORLD_SIZE": "2"})
    assert result.returncode == 0, result.stdout
    found = start(sharded, "--fsdp=auto_wrap", "--gradient_checkpointing=true", ranks=2)
    assert found.returncode == 0, found.stdout
    assert compare_runs.main([str(two), str(sharded), "--assert-equal", "1e-4"]) == 0


@pytest.mark.long
def test_a_model_of_a_folder_on_streamed_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    run, export = tmp_path / "run", tmp_path / "export"
    result = train({"RUN_DIR": str(run), "TRAIN_ITERS": "2"})
    assert result.returncode == 0, result.stdout
    command = [sys.executable, str(ROOT / "tools/convert_hf.py"), "export", str(run), str(export)]
    subprocess.run(command, env=environment({}), check=True, timeout=120)
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"line {n} of some text"}) for n in range(400))
    text.write_text("".join(f"{line}\n" for line in lines))
    words = [f"--dataset_name={text}", "--streaming", f"--model_name_or_path={export}"]
    found = start(tmp_path / "hf", *words, "--max-eval-samples=6")
    assert found.returncode == 0, found.stdout
    records = read(tmp_path / "hf" / "metrics.jsonl")
    assert [r["samples"] for r in records if r["event"] == "eval"] == [6]
    losses = [r["loss"] for r in records if r["event"] == "step"]
    assert len(losses) == 3 and all(b < a for a, b in itertools.pairwise(losses))

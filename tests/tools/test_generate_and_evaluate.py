"""tools/generate.py and tools/evaluate.py on a run of two ranks, beside transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.config.errors import ConfigError
from megatron.training.saved_model import find
from tests.e2e.recorded import train_recorded, write_data
from tests.spawn import run
from tools import convert_hf, evaluate, generate

PROMPT = "5 17 99"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in tensor-parallel halves, with an evaluation, a list and an export."""
    folder = tmp_path_factory.mktemp("trained")
    variables = {
        "TP": "2", "DATA_FILE_LIST": str(write_data(folder)), "RUN_DIR": str(folder / "run"),
        "SEQ": "32", "TRAIN_ITERS": "8", "LR_DECAY_ITERS": "8", "EVAL_INTERVAL": "8",
        "EVAL_ITERS": "2", "LR": "0.03", "TRAIN_SPLIT": "8", "VAL_SPLIT": "2",
    }  # fmt: skip
    assert [one.status for one in run(train_recorded, 2, variables)] == [0, 0]
    assert convert_hf.main(["export", str(folder / "run"), str(folder / "hf")]) == 0
    return folder


def evaluation(folder: Path) -> dict[str, Any]:
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return next(record for record in records if record["event"] == "eval")


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--no-cache"]], ids=str)
def test_the_text_is_that_of_transformers_on_the_export(
    trained: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(trained / "hf")
    ids = torch.tensor([[int(word) for word in PROMPT.split()]])
    want = theirs.generate(ids, max_new_tokens=29, do_sample=False, eos_token_id=None)[0].tolist()
    want = want[: want.index(159)] if 159 in want else want  # the end of a document
    words = ["--prompt", PROMPT, "--temperature", "0", "--max-new-tokens", "29"]
    assert generate.main([str(trained / "run"), *words, *more]) == 0
    captured = capsys.readouterr()
    assert [int(word) for word in captured.out.split()] == want and len(want) > 4
    assert "step-00000008: 0.0M parameters, fp32 on cpu" in captured.err


def test_a_pipe_gives_a_prompt_a_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 2\n3\n\n"))
    words = ["--max-new-tokens", "2", "--top-k", "3", "--seed", "4", "--device", "cpu"]
    assert generate.main([str(trained / "run/checkpoints/step-00000008"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[: n] for line, n in zip(lines, (2, 1, 0), strict=True)] == [
        ["1", "2"], ["3"], [],
    ]  # fmt: skip


def test_a_text_longer_than_the_model_is_told(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", PROMPT, "--max-new-tokens", "90", "--seed", "1"]
    assert generate.main([str(trained / "run"), *words]) == 0
    found = capsys.readouterr()
    assert found.err.count("longer than SEQ=32: it goes on from its last 16 tokens") == 1
    assert len(found.out.split()) > 32


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--prompt", "1 " * 33], 2, "the prompt has 33 tokens, and the model was made for SEQ=32"),
        (["--prompt", "1", "--top-p", "0"], 2, "--top-p 0: must be above 0"),
        (["--prompt", "1", "--temperature", "-1"], 2, "--temperature -1: must be 0 or more"),
        (["--prompt", "1", "--max-new-tokens", "0"], 2, "--max-new-tokens 0"),
        (["--prompt", "1", "--iteration", "7"], 4, "is no checkpoint of step 7"),
    ],
)
def test_what_cannot_be_is_refused(
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    message: str,
) -> None:
    assert generate.main([str(trained / "run"), *words]) == status
    assert message in capsys.readouterr().err


def test_another_tokenizer_than_in_training_is_refused(trained: Path) -> None:
    saved = find(str(trained / "run"))
    assert saved.tokenizer().vocab_size == 160
    with pytest.raises(ConfigError, match="was trained with another tokenizer"):
        dataclasses.replace(saved, tokenizer_digest="0" * 64).tokenizer()


def figures(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert evaluate.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_figures_are_those_of_the_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, want = figures(capsys, str(trained / "run")), evaluation(trained)
    assert found["iteration"] == 8 and found["all"]["samples"] == want["samples"] == 16
    for name in ("loss", "accuracy"):
        assert found["all"][name] == pytest.approx(want[name], abs=1e-6)
    corpora = [found["corpus_0"], found["corpus_1"]]
    total = sum(one["loss"] * one["tokens"] for one in corpora)
    assert total / (16 * 32) == pytest.approx(want["loss"], abs=1e-6)


def test_a_list_is_read_once_and_has_the_loss_of_transformers(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained / "list.txt"
    found = figures(capsys, str(trained / "run"), str(path))
    data = [torch.frombuffer(bytearray(Path(line.split()[1] + ".bin").read_bytes()),
                             dtype=torch.uint16).long()
            for line in path.read_text().splitlines()]  # fmt: skip
    samples = torch.cat([tokens[: 124 * 32 + 1].unfold(0, 33, 32) for tokens in data])
    theirs = AutoModelForCausalLM.from_pretrained(trained / "hf")
    with torch.no_grad():
        logits = theirs(samples[:, :-1]).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, samples[:, 1:].flatten())
    assert found["all"]["samples"] == len(samples) == 248
    assert found["all"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    right = (logits.argmax(-1) == samples[:, 1:].flatten()).float().mean()
    assert found["all"]["accuracy"] == pytest.approx(float(right), abs=1e-6)
    some = figures(capsys, str(trained / "run"), str(path), "--samples", "9", "--batch", "2")
    assert some["all"]["samples"] == 9


def test_a_text_is_cut_into_pieces(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "text.txt").write_text(" ".join(str(n % 150) for n in range(70)))
    found = figures(capsys, str(trained / "run"), "--data", str(trained / "text.txt"))
    assert found["all"]["tokens"] == 69 and found["all"]["samples"] == 3


def test_what_cannot_be_evaluated_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / "one.txt").write_text("7")
    for words, status, message in (
        ([str(trained / "hf")], 2, "was not trained here: give a LIST, or --data TEXT"),
        ([str(trained / "run"), "a", "--data", "b"], 2, "are alternatives"),
        ([str(trained / "run"), "gone.txt"], 3, "LIST=gone.txt does not exist"),
        ([str(trained / "run"), "--data", str(trained / "one.txt")], 3, "a loss needs two"),
        ([str(trained / "run"), "--split", "test"], 2, "the run has no test data"),
    ):
        assert evaluate.main(words) == status
        assert message in capsys.readouterr().err

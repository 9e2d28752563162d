"""`DATA=book.txt bash train_alcf.sh`: a text to a model, and what happens when the text changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.config.schema import read_run
from tests.e2e.front_door import ROOT, TINY, command, environment, tool, train

TEXT = "".join(
    f"In chapter {i} the sea is {i * i % 17} miles wide and cold.\n" for i in range(3000)
)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "book.txt").write_text(TEXT)
    return {
        "DATA": str(tmp_path / "book.txt"), "RUN_DIR": str(tmp_path / "run"),
        "TOKENIZER_TYPE": "ByteTokenizer", "SAVE_INTERVAL": "2", "EVAL_INTERVAL": "0",
    }  # fmt: skip


@pytest.mark.long
def test_a_text_is_prepared_once_trained_on_and_compared_at_a_resume(
    settings: dict[str, str], tmp_path: Path
) -> None:
    first = train(settings)
    assert first.returncode == 0, first.stdout
    assert "1.00 bytes per token" in first.stdout
    assert "Sample from the model" in first.stdout
    run = read_run(tmp_path / "run" / "run.json")
    assert run.data.data_file_list.startswith(str(tmp_path / "data-cache" / "book-"))
    again = train({**settings, "TRAIN_ITERS": "6"})
    assert again.returncode == 0, again.stdout
    assert "bytes per token" not in again.stdout
    alone = train({"DATA_FILE_LIST": run.data.data_file_list, "RUN_DIR": str(tmp_path / "other")})
    assert alone.returncode == 0, alone.stdout
    assert "tokenizer ByteTokenizer, as " in alone.stdout
    os.utime(settings["DATA"], ns=(1, 1))  # the same text
    touched = train({**settings, "TRAIN_ITERS": "7"})
    assert touched.returncode == 0, touched.stdout
    (tmp_path / "book.txt").write_text(TEXT.replace("sea", "sky", 1))
    changed = train({**settings, "TRAIN_ITERS": "8"})
    assert changed.returncode == 3, changed.stdout
    assert "has changed since it was prepared" in changed.stdout
    assert "the data is not what" in changed.stdout
    resumed = tool_run("--resume", str(tmp_path / "run"), TRAIN_ITERS="8")
    assert resumed.returncode == 0, resumed.stdout


def tool_run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*flags),
        env=environment({"WANDB_MODE": "disabled", **variables}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


@pytest.mark.long
def test_ctrl_c_while_the_text_is_prepared(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT * 600)
    process = subprocess.Popen(
        command(),
        env=environment({**TINY, **settings}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if list(tmp_path.glob("data-cache/*/*.partial")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted: the same command goes on from here" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.long
def test_a_rank_that_another_launcher_started_prepares_it(
    settings: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(ROOT / "pretrain_gpt_alcf.py")],
        env=environment({**TINY, **settings, "TRAIN_ITERS": "2"}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("1.00 bytes per token") == 1


@pytest.mark.long
def test_several_corpora_from_one_call_train_with_what_they_remember(tmp_path: Path) -> None:
    for name, text in {"law": TEXT, "code": TEXT[:60_000].upper()}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    made = tool(
        "preprocess_data.py", "--input", str(tmp_path / "law"), str(tmp_path / "code"),
        "--per-folder", "--tokenizer-type", "ByteTokenizer", "--append-eod",
        "--output-prefix", str(tmp_path / "d"),
    )  # fmt: skip
    assert made.returncode == 0, made.stdout
    assert tool("check_data.py", str(tmp_path / "d.list")).returncode == 0
    run = train({"DATA_FILE_LIST": str(tmp_path / "d.list"), "RUN_DIR": str(tmp_path / "run")})
    assert run.returncode == 0, run.stdout
    assert read_run(tmp_path / "run" / "run.json").data.tokenizer_type == "ByteTokenizer"

"""tools/prepare_cache.py builds what a run of the same settings then finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.megatron_order.datasets import build_megatron_datasets
from tests.data.megatron_cases import settings, write_pair

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_cache.py"


@pytest.fixture
def run(tmp_path):
    """Runs the tool over two small files."""
    prefixes = [write_pair(tmp_path / name, [30] * 200) for name in "ab"]
    (tmp_path / "list.txt").write_text("".join(f"1 {p} corpus\n" for p in prefixes))
    variables = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "DATA_ORDER": "megatron",
        "DATA_FILE_LIST": "list.txt", "DATA_CACHE_PATH": "cache", "TOKENIZER_TYPE": "NullTokenizer",
        "VOCAB_SIZE": "65000", "MODEL_ARCH": "debug", "SEQ": "16", "TRAIN_ITERS": "40",
        "MICRO_BATCH": "8", "GRAD_ACC_STEPS": "1", "EVAL_INTERVAL": "20", "EVAL_ITERS": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip

    def run(*arguments, **changes):
        return subprocess.run(
            [sys.executable, str(TOOL), *arguments],
            cwd=tmp_path, env={**variables, **changes}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    run.lines = [(1.0, prefix, "corpus") for prefix in prefixes]
    return run


def test_a_run_finds_everything(run, tmp_path):
    done = run("--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "complete after" in done.stdout
    said = []
    same = settings(run.lines, shares=(990.0, 10.0, 0.0))
    splits = build_megatron_datasets(same, tmp_path / "cache", said.append)
    assert not said and len(splits.train) == 322


def test_verify_finds_what_a_start_does_not_look_for(run, tmp_path):
    assert run("--workers", "1", TRAIN_ITERS="8000").returncode == 0
    path = max((tmp_path / "cache").glob("file-*"), key=lambda path: path.stat().st_size)
    whole = path.read_bytes()
    assert len(whole) > 1 << 18  # more than a start reads
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "is rebuilt" not in run("--workers", "1", TRAIN_ITERS="8000").stderr
    done = run("--workers", "1", "--verify", TRAIN_ITERS="8000")
    assert done.returncode == 0 and f"{path.name} (the train index" in done.stderr
    assert path.read_bytes() == whole


def test_what_cannot_be_prepared(run, tmp_path):
    refused = run(DATA_ORDER="stateless")
    assert refused.returncode == 2 and "set DATA_ORDER=megatron" in refused.stderr
    refused = run("--workers", "0")
    assert refused.returncode == 2 and "--workers 0" in refused.stderr
    refused = run("--train-data-exact-num-epochs", "7")
    assert refused.returncode == 3 and "TRAIN_DATA_EXACT_NUM_EPOCHS=7" in refused.stderr

"""Ranks that read different lists would train on different tokens without a word."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron.data.data_list import DataSource
from megatron.data.prepare.builtin import BuiltinCorpus
from megatron.data.prepare.plain_tokenizers import ByteTokenizer
from megatron.training import run_data
from tests.data.pairs import write_tokens
from tests.data.started import start
from tests.spawn import run

SETTINGS = {"TOKENIZER_TYPE": "ByteTokenizer", "SEQ": "64", "TRAIN_ITERS": "4"}


def start_in_own_folder(folder: str, settings: dict[str, str]) -> tuple[int, str]:
    os.chdir(Path(folder, f"host{min(dist.get_rank(), 1)}"))
    return start(settings)


def start_with_own_cache(prefix: str) -> tuple[int, str]:
    sources = (DataSource(1.0, f"{prefix}{dist.get_rank()}", "code", 1),)
    corpus = BuiltinCorpus(sources, ByteTokenizer(), None)
    run_data.builtin_corpus = lambda *_: corpus
    return start({"SEQ": "64", "TRAIN_ITERS": "4"})


def hosts(folder: Path, own: str, other: str, name: str = "data.list") -> list[tuple[int, str]]:
    """Starts of 3 ranks, the second and third on another host than the first."""
    for number, text in enumerate((own, other)):
        (folder / f"host{number}").mkdir()
        (folder / f"host{number}" / "data.list").write_text(f"1 {folder}/a books\n")
        (folder / f"host{number}" / name).write_text(text)
    variable = "DATA_FILE_LIST" if name == "data.list" else "VALID_DATA_FILE_LIST"
    settings = {**SETTINGS, "DATA_FILE_LIST": "data.list", variable: name}
    return run(start_in_own_folder, 3, str(folder), settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        write_tokens(tmp_path / name, np.arange(40_000) % 256, documents=40)
    return tmp_path


def test_equal_lists_start(folder: Path) -> None:
    text = f"1 {folder}/a books\n"
    assert hosts(folder, text, f"# copied\n{text}") == [(0, "")] * 3


@pytest.mark.parametrize("name", ["data.list", "valid.list"])
def test_another_weight_is_refused(folder: Path, name: str) -> None:
    own, other = (f"1 {folder}/a books\n{weight} {folder}/b books\n" for weight in (1, 2))
    for status, message in hosts(folder, own, other, name):
        assert status == 3
        assert f"{name} is another list on other hosts" in message
        assert f"rank 0 on {os.uname().nodename}: stage 0 weight 1.0 {folder}/b" in message
        assert f"rank 1 on {os.uname().nodename}: stage 0 weight 2.0 {folder}/b" in message
        assert "where all hosts see one file" in message


def test_a_line_less_is_refused(folder: Path) -> None:
    line = f"1 {folder}/a books\n"
    for status, message in hosts(folder, line * 2, line):
        assert status == 3
        assert message.count(": nothing more") == 1


def test_two_folders_of_the_built_in_corpus_are_refused(folder: Path) -> None:
    for status, message in run(start_with_own_cache, 2, f"{folder}/cache"):
        assert status == 3
        assert f"{folder}/cache0" in message
        assert f"{folder}/cache1" in message
        assert "set XDG_CACHE_HOME" in message

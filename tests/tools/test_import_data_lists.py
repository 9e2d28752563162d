"""tools/import_data_lists.py: lists of a checkout, as they stand there, and never over changes."""

from pathlib import Path

import pytest

from megatron.config.errors import DataError
from megatron.data.data_list import parse_data_list
from tools import import_data_lists

LLAMA = "/eagle/dolma/data_v1.7_Llama2Tokenizer"
LISTS = {
    "aurora/books.txt": f"0.0018 {LLAMA}/books-0000_text_document books\n"
    f"0.0054 {LLAMA}/books-0001_text_document books\n\n",
    "aurora/olmo-mix-1124.txt": "0.5 /flare/data_fused_gemma_eod/a wiki\n2.217 /flare/"
    "data_fused_gemma_eod/b.bin pes2o\n",
    "polaris/dolma_v1_7_file_list.txt": f"0.25 {LLAMA}/x\n0.75 {LLAMA}/y\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with three lists, and what is not one."""
    for name, text in LISTS.items():
        path = tmp_path / "theirs" / "ALCF/data-lists" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "theirs/ALCF/data-lists/README.md").write_text("not a machine")
    return tmp_path / "theirs"


def call(checkout: Path, out: Path, *more: str) -> int:
    return import_data_lists.main([str(checkout), "--out", str(out), *more])


def test_all_lists_are_copied_byte_for_byte_and_told_about(checkout, tmp_path, capsys):
    out = tmp_path / "here"
    for _ in range(2):  # again: nothing changes
        assert call(checkout, out) == 0
        assert {
            str(path.relative_to(out)): path.read_text() for path in out.rglob("*.txt")
        } == LISTS
        text = capsys.readouterr().out
        assert "aurora/books.txt: 2 lines, 2 files, 1 corpora, weights add up to 0.0072, llama" in (
            text
        )
        assert "olmo-mix-1124.txt: 2 lines, 2 files, 2 corpora, weights add up to 2.717, gemma" in (
            text
        )
        assert "3 lists of 2 machines" in text
        assert "2 list(s), by the names of their files, hold Llama-2's ids" in text
        assert "changed" not in text


def test_one_machine(checkout, tmp_path, capsys):
    assert call(checkout, tmp_path / "here", "--machine", "polaris") == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["polaris"]
    assert call(checkout, tmp_path / "here", "--machine", "theta") == 2
    assert "--machine theta" in capsys.readouterr().err


def test_a_changed_list_stays_unless_forced(checkout, tmp_path, capsys):
    out = tmp_path / "here"
    mine = out / "aurora/books.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("1 mine books\n")
    assert call(checkout, out) == 2
    assert mine.read_text() == "1 mine books\n"
    assert not (out / "polaris").exists(), "all or nothing"
    assert str(mine) in capsys.readouterr().err
    assert call(checkout, out, "--force") == 0
    assert mine.read_text() == LISTS["aurora/books.txt"]
    assert "changed" in capsys.readouterr().out


def test_a_list_that_a_run_would_refuse_is_not_copied(checkout, tmp_path, capsys):
    bad = checkout / "ALCF/data-lists/aurora/bad.txt"
    bad.write_text("much data/books books\n")
    assert call(checkout, tmp_path / "here") == 3
    assert not (tmp_path / "here/aurora/bad.txt").exists()
    assert (tmp_path / "here/aurora/books.txt").exists()
    assert f"{bad}:1" in capsys.readouterr().err


def test_what_is_no_checkout(tmp_path, capsys):
    assert call(tmp_path, tmp_path / "here") == 2
    assert "checkout of argonne-lcf/Megatron-DeepSpeed" in capsys.readouterr().err


def test_a_missing_list_of_a_machine_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"python3 tools/import_data_lists\.py CHECKOUT"):
        parse_data_list("ALCF/data-lists/aurora/dolma.txt")
    with pytest.raises(DataError, match=r"is \$\(\.\.\.\) empty"):
        parse_data_list("ALCF/data-lists//books.txt")
    with pytest.raises(DataError) as error:
        parse_data_list("mine.txt")
    assert "import_data_lists" not in str(error.value)

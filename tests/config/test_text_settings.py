"""DATA, and the tokenizer that data remembers, in the configuration."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.data.tokenizer_note import Note, kept_model, note_path, read_note
from megatron.plan.report import dry_run_text
from tests.config.helpers import configured, refusal, resolved, started, write_pair


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael. " * 100)
    return Path("book.txt")


def test_a_text_stands_for_a_list_and_a_tokenizer(book):
    found = resolved(DATA="book.txt")
    data, folder = found.run.data, Path(found.run.data.data_file_list).parent
    assert folder.parent == Path("runs/data-cache")
    assert (data.tokenizer_type, data.tokenizer_model) == (
        "BuiltinTokenizer", str(folder / "tokenizer.model"),
    )  # fmt: skip
    assert found.run.model.vocab_size == 4096
    assert found.run.checkpoint.run_name == "debug-seq128-book"
    shown = dry_run_text(found, "")
    assert f"DATA=book.txt: 1 file, 0.0 MB, to be prepared in {folder} with" in shown
    assert not Path("runs").exists()


def test_its_list_follows_from_text_and_tokenizer_alone(book):
    def made(**settings):
        return configured(DATA="book.txt", **settings).data.data_file_list

    first = made()
    assert made(TRAIN_ITERS=7, SEQ=64, RUN_NAME="other") == first
    others = [made(TOKENIZER_TYPE="ByteTokenizer"), made(DATA_KEY="content")]
    stat = book.stat()
    os.utime(book, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    others.append(made())
    book.write_text("Call me Ahab. ")
    others.append(made())
    assert len({first, *others}) == 5


def test_the_given_tokenizer_is_taken(book):
    run = configured(DATA="book.txt", TOKENIZER_TYPE="ByteTokenizer", MODEL_ARCH="7B")
    assert (run.data.tokenizer_type, run.data.tokenizer_model) == ("ByteTokenizer", None)
    assert run.model.vocab_size == 257
    assert configured(DATA="book.txt", MODEL_ARCH="7B").model.vocab_size == 4096


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DATA": "book.txt", "DATA_FILE_LIST": "l.txt"}, "DATA=book.txt and DATA_FILE_LIST=l.txt"),
        ({"DATA": "none.txt"}, "DATA=none.txt does not exist"),
        ({"DATA": "book.txt", "DATA_CACHE_PATH": "my cache"}, "set DATA_CACHE_PATH"),
        ({"DATA_FILE_LIST": "book.txt"}, "If book.txt is text to train on.*DATA=book.txt"),
        ({"DATA_FILE_LIST": "."}, "If . is text to train on.*DATA=."),
        ({"DATA": "book.txt", "TOKENIZER_TYPE": "CharTokenizer"}, "needs TOKENIZER_MODEL"),
    ],
)
def test_refused(book, settings, message):
    text = refusal(**settings)
    assert re.search(message, text), text


def test_a_key_without_a_text_has_no_effect(book):
    assert any("DATA_KEY=body has no effect" in w for w in resolved(DATA_KEY="body").warnings)


@pytest.mark.parametrize("settings", [{}, {"TOKENIZER_TYPE": "ByteTokenizer", "DATA_KEY": "k"}])
def test_a_resumed_run_keeps_what_was_prepared(book, settings):
    before = started(DATA="book.txt", RUN_NAME="r", **settings)
    kept = Path(before.data.data_file_list)
    kept.parent.mkdir(parents=True)
    kept.write_text("1 a book\n")
    book.unlink()
    after = configured("--resume", "r", TRAIN_ITERS=300)
    assert (after.data, after.model) == (before.data, before.model)
    other = configured("--resume", "r", DATA_FILE_LIST="builtin", ALLOW_DATA_CHANGE=1)
    assert (other.data.data, other.data.data_file_list) == (None, "builtin")
    kept.unlink()
    assert "DATA=book.txt does not exist" in refusal("--resume", "r")


def noted(prefix: Path, kind: str | None, model: str | None = None, **changes: object) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_pair(prefix, [2000])
    note = Note("f" * 64, 300, 299, True, "digest", kind, kept_model(model, str(prefix)))
    note = dataclasses.replace(note, **changes)
    note_path(str(prefix)).write_text(json.dumps(dataclasses.asdict(note)))


@pytest.fixture
def listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("l.txt").write_text("1 data/a\n1 data/b\n")
    Path("tok").mkdir()
    Path("tok/alphabet.json").write_text(json.dumps([str(i) for i in range(300)]))
    for name in "ab":
        noted(Path("data", name), "CharTokenizer", "tok/alphabet.json")
    return tmp_path


def test_a_list_brings_the_tokenizer_of_its_files(listed):
    found = resolved(DATA_FILE_LIST="l.txt", MODEL_ARCH="7B")
    data = found.run.data
    assert data.tokenizer_type == "CharTokenizer"
    assert data.tokenizer_model == str(listed / "tok/alphabet.json")
    assert found.run.model.vocab_size == 300
    assert any("as data/a.tokenizer.json says" in note for note in found.notes)
    chosen = configured(DATA_FILE_LIST="l.txt", TOKENIZER_TYPE="ByteTokenizer")
    assert (chosen.data.tokenizer_type, chosen.model.vocab_size) == ("ByteTokenizer", 257)


def test_files_of_two_tokenizers_are_refused(listed):
    noted(Path("data/b"), "ByteTokenizer", tokenizer="0" * 64)
    text = refusal(DATA_FILE_LIST="l.txt")
    assert "data/b.bin was made with ByteTokenizer (000000000000" in text
    assert "data/a.bin with CharTokenizer" in text


def test_a_tokenizer_that_moved_is_named(listed):
    Path("tok").rename("elsewhere")
    text = refusal(DATA_FILE_LIST="l.txt")
    assert "tok/alphabet.json, which is no longer there" in text
    assert "TOKENIZER_TYPE=CharTokenizer TOKENIZER_MODEL=<where it is now>" in text


def test_a_tokenizer_beside_the_data_moves_with_it(listed):
    Path("data/alphabet.json").write_text(Path("tok/alphabet.json").read_text())
    for name in "ab":
        noted(Path("data", name), "CharTokenizer", "data/alphabet.json")
    Path("data").rename("moved")
    Path("l.txt").write_text("1 moved/a\n1 moved/b\n")
    assert configured(DATA_FILE_LIST="l.txt").data.tokenizer_model == "moved/alphabet.json"


def test_notes_of_older_versions_leave_the_choice_as_it_was(listed):
    for name in "ab":
        note = dataclasses.asdict(read_note(f"data/{name}"))
        note_path(f"data/{name}").write_text(json.dumps({k: note[k] for k in list(note)[:5]}))
    assert configured(DATA_FILE_LIST="l.txt").data.tokenizer_model == "google/gemma-7b"


def test_a_name_on_the_hub_is_remembered_as_it_is(listed):
    for name in "ab":
        noted(Path("data", name), "HFTokenizer", "org/unknown-tokenizer")
    run = configured(DATA_FILE_LIST="l.txt")
    assert (run.data.tokenizer_model, run.model.vocab_size) == ("org/unknown-tokenizer", 300)
    with pytest.raises(ConfigError, match="vocabulary size is not known"):
        configured(DATA_FILE_LIST="l.txt", TOKENIZER_MODEL="org/unknown-tokenizer")

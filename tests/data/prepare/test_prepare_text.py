"""A user's own text, prepared: once, whole, resumed, and known again by its content."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.data.data_list import parse_data_list
from megatron.data.indexed import IndexedDataset
from megatron.data.own_text import OwnText, own_text
from megatron.data.prepare import prepare_text, text_input
from megatron.data.prepare.tokenizer import build_tokenizer
from megatron.data.tokenizer_note import model_of, read_note

ROOT = Path(__file__).parents[3]


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael. Some years ago - never mind how long\n" * 40)
    return Path("book.txt")


def of(given: str = "book.txt", kind: str = "ByteTokenizer", model: str | None = None) -> OwnText:
    return own_text(given, "text", kind, model, None, Path("cache"))


def tokens(own: OwnText) -> list[int]:
    (source,) = parse_data_list(own.data_file_list)
    data = IndexedDataset(source.prefix)
    return [token for i in range(len(data)) for token in data.sequence(i).tolist()]


def test_a_text_becomes_a_list_that_names_its_tokenizer(book, capsys):
    own = of()
    prepare_text.prepare(own)
    assert tokens(own) == [*book.read_bytes(), 256]
    (source,) = parse_data_list(own.data_file_list)
    assert source.corpus == "book"
    assert read_note(source.prefix).kind == "ByteTokenizer"
    assert "1.00 bytes per token" in capsys.readouterr().err
    prepare_text.prepare(own)
    assert capsys.readouterr().err == ""  # nothing is left to do


def test_the_built_in_tokenizer_stays_with_the_data(book, monkeypatch):
    text = " ".join(f"word{i} call me" for i in range(300))
    model = Path("made.model")
    model.write_bytes(prepare_text_model(text))
    monkeypatch.setattr(prepare_text, "builtin_model", lambda: str(model))
    own = of(kind="BuiltinTokenizer")
    prepare_text.prepare(own)
    (source,) = parse_data_list(own.data_file_list)
    note = read_note(source.prefix)
    assert (note.kind, note.model) == ("BuiltinTokenizer", "./tokenizer.model")
    tokenizer = build_tokenizer("BuiltinTokenizer", model_of(note, source.prefix))
    assert tokenizer.fingerprint() == note.tokenizer
    assert tokens(own) == [*tokenizer.encode(book.read_text()), tokenizer.eod]


def prepare_text_model(text: str) -> bytes:
    from megatron.data.prepare.builtin import train_sentencepiece

    return train_sentencepiece([[text]], 300)


def test_the_same_content_has_the_same_name_and_another_one_is_said(book, capsys):
    def made() -> str:
        own = of()
        prepare_text.prepare(own)
        return Path(parse_data_list(own.data_file_list)[0].prefix).name

    first, words = made(), book.read_text()
    os.utime(book, ns=(1, 1))
    assert made() == first
    assert "book.txt has changed since it was prepared" in capsys.readouterr().err
    book.write_text(words.replace("never", "niver", 1))  # as many tokens
    assert made() != first


def test_an_interrupted_preparation_goes_on(book, monkeypatch, capsys):
    monkeypatch.setattr(text_input, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr("megatron.data.prepare.preprocess.SAVE_SECONDS", 0.0)
    writer = "megatron.data.prepare.preprocess.ShardedWriter.append"
    append = prepare_text.preprocess.__globals__["ShardedWriter"].append

    def stopped(self, unit, *arguments):
        if unit == 3:
            raise KeyboardInterrupt
        append(self, unit, *arguments)

    with monkeypatch.context() as stop:
        stop.setattr(writer, stopped)
        assert prepare_text.main([of().to_json()]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not of().is_prepared
    assert prepare_text.main([of().to_json()]) == 0
    assert "going on from 41." in capsys.readouterr().err
    assert tokens(of()) == [*book.read_bytes(), 256]


def test_folders_tables_and_keys(book):
    pyarrow = pytest.importorskip("pyarrow")
    Path("d/deep").mkdir(parents=True)
    Path("d/a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    Path("d/deep/b.md").write_text("# two")
    Path("d/p.png").write_bytes(b"\0")
    own = of("d")
    prepare_text.prepare(own)
    assert tokens(own) == [*b"one", 256, *b"# two", 256]
    table = pyarrow.table({"text": ["x", "yy"], "label": [0, 1]})
    with pyarrow.OSFile("t.arrow", "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    with pyarrow.OSFile("f.arrow", "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table, max_chunksize=1)
    for name in ("t.arrow", "f.arrow"):
        prepare_text.prepare(of(name))
        assert tokens(of(name)) == [*b"x", 256, *b"yy", 256]
    with pytest.raises(ConfigError, match=r"^--json-keys body: .* has the columns text, label"):
        prepare_text.prepare(own_text("t.arrow", "body", "ByteTokenizer", None, None, Path("c")))
    Path("bad.jsonl").write_text("no json\n" * 101)
    with pytest.raises(DataError, match="101 bad lines"):
        prepare_text.prepare(of("bad.jsonl"))


KILLED_AT_THE_FOURTH_PIECE = """
import os, signal, sys
from megatron.data.prepare import prepare_text, preprocess, text_input
append = preprocess.ShardedWriter.append
def killed(self, unit, *arguments):
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, unit, *arguments)
preprocess.ShardedWriter.append = killed
preprocess.SAVE_SECONDS, text_input.PIECE_CHARACTERS = 0.0, 1 << 20
prepare_text.main(sys.argv[1:])
"""


def started(own: OwnText, *program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(program or ("-m", "megatron.data.prepare.prepare_text")), own.to_json()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_two_processes_prepare_it_once_and_a_killed_one_goes_on(book):
    book.write_text("".join(f"line {i} of a longer book\n" for i in range(500_000)))
    own = of()
    first = started(own, "-c", KILLED_AT_THE_FOURTH_PIECE)
    first.communicate(timeout=100)
    assert first.returncode == -signal.SIGKILL
    assert not own.is_prepared
    processes = [started(own) for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("going on from" in text for text in said) == [False, True]
    assert sorted("bytes per token" in text for text in said) == [False, True]
    assert len(tokens(own)) == book.stat().st_size + 1

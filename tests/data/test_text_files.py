"""What a user may name as text: files, folders, patterns, saved data sets, names on the Hub."""

import json
from pathlib import Path

import pytest

from megatron.config.errors import DataError
from megatron.data.text_files import find_text, hub_parts


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "my book.txt": b"once", "notes": b"no suffix", "d/a.jsonl": b"{}", "d/deep/b.md": b"# b",
        "d/picture.png": b"\x89PNG\0", "d/.git/c.txt": b"hidden", "d/empty.txt": b"",
        "tokens/x.bin": b"\0", "tokens/x.idx": b"\0", "picture": b"\x89PNG\0", "void.txt": b"",
        "set/dataset_dict.json": b"{}", "set/train/state.json": b"", "odd/state.json": b"{}",
        "set/train/data-1.arrow": b"1", "set/train/data-0.arrow": b"0", "set/train/c.arrow": b"9",
        "valid/dataset_dict.json": b"{}", "odd/a.txt": b"a", "gone/state.json": b"",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    for folder in ("set/train", "gone"):
        files = [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}]
        Path(folder, "state.json").write_text(json.dumps({"_data_files": files}))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "name", "paths", "left_out"),
    [
        ("my book.txt", "my-book", ["my book.txt"], 0),
        ("notes", "notes", ["notes"], 0),
        ("d", "d", ["d/a.jsonl", "d/deep/b.md"], 2),
        ("d/*.jsonl", "text", ["d/a.jsonl"], 0),
        ("set", "set", ["set/train/data-0.arrow", "set/train/data-1.arrow"], 0),
        ("odd", "odd", ["odd/a.txt", "odd/state.json"], 0),
        ("hub:a/b:c", "a-b-c", ["hub:a/b:c"], 0),
    ],
)
def test_found(here, given, name, paths, left_out):
    text = find_text(given, "DATA")
    assert (text.name, list(text.paths), text.left_out) == (name, paths, left_out)
    assert text.size == sum(Path(path).stat().st_size for path in paths if ":" not in path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing.txt", "DATA=nothing.txt does not exist"),
        ("picture", "is no text"),
        ("void.txt", "DATA=void.txt is empty"),
        ("tokens", "these are tokens: tools/make_data_list.py"),
        ("valid", "the data set has no split train"),
        ("gone", "data-0.arrow is missing"),
        ("hub:a/b/c", "write hub:NAME"),
        ("hub:a:b:c:d", "write hub:NAME"),
    ],
)
def test_refused(here, given, message):
    with pytest.raises(DataError, match=message):
        find_text(given, "DATA")


def test_the_parts_of_a_name_on_the_hub():
    assert hub_parts("hub:org/name", "DATA") == ("org/name", None, "train")
    assert hub_parts("hub:name:config:test", "DATA") == ("name", "config", "test")
    assert hub_parts("hub:name::test", "DATA") == ("name", None, "test")

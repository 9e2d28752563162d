"""tools/make_data_list.py: shares by tokens, by temperature, or as given."""

from collections import defaultdict

import numpy as np
import pytest

from megatron.data.data_list import parse_data_list
from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import ByteTokenizer, NullTokenizer
from tests.data.pairs import write_tokens
from tools import make_data_list


@pytest.fixture
def data(tmp_path):
    for name, tokens in {"books/a": 100, "books/b": 300, "code/c": 1200}.items():
        write_tokens(tmp_path / name, np.zeros(tokens))
    return tmp_path


def shares(folder, *arguments):
    output = folder / "list.txt"
    assert make_data_list.main([*arguments, "--output", str(output)]) == 0
    sources = parse_data_list(output)
    corpora: dict[str, float] = defaultdict(float)
    for source in sources:
        corpora[source.corpus] += source.weight
    return {name: pytest.approx(share) for name, share in corpora.items()}, sources


def test_weights(data):
    books, code = str(data / "books"), str(data / "code")
    corpora, sources = shares(data, books, code)
    assert corpora == {"books": 0.25, "code": 0.75}
    assert sources[1].weight == pytest.approx(3 * sources[0].weight)  # by tokens within a corpus
    assert shares(data, books, code, "--temperature", "2")[0] == {
        "books": 20 / (20 + 1200**0.5),
        "code": 1200**0.5 / (20 + 1200**0.5),
    }
    named = (f"b={books}", f"c={code}/c.bin")
    corpora, sources = shares(data, *named, "--shares", "b=3", "c=1", "--max-epochs", "b=2.5")
    assert corpora == {"b": 0.75, "c": 0.25}
    assert [source.max_epochs for source in sources] == [2.5, 2.5, None]


def test_files_of_two_tokenizers_are_refused(data, capsys):
    write_note(str(data / "books/a"), ByteTokenizer(), append_eod=True)
    assert make_data_list.main([str(data / "books")]) == 0  # the other one names none
    write_note(str(data / "code/c"), NullTokenizer(257), append_eod=True)
    assert make_data_list.main([str(data / "books"), str(data / "code")]) == 3
    assert "the files of a list have one tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["books", "code", "--shares", "books=1"], 2, "none for code"),
        (["books", "--shares", "pages=1"], 2, "the corpora are books"),
        (["books", "--shares", "books=x"], 2, "CORPUS=NUMBER"),
        (["books/gone"], 3, "gone.idx does not exist"),
        (["books", "--output", "nowhere/list.txt"], 2, "--output nowhere/list.txt"),
        (["."], 2, "no .idx"),
    ],
)
def test_refusals(data, monkeypatch, capsys, tmp_path, arguments, status, words):
    monkeypatch.chdir(data)
    if arguments == ["."]:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
    assert make_data_list.main(arguments) == status
    assert words in capsys.readouterr().err

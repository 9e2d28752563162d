"""The built-in corpus: content, cache, one maker in a race, damage."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.prepare import builtin
from megatron.data.prepare.builtin import builtin_corpus, default_cache, prose_documents
from megatron.data.prepare.checks import check_files

SMALL = 1_000_000  # characters of each corpus in these tests
ROOT = Path(__file__).parents[3]

MAKE = f"""
import sys
from pathlib import Path
from megatron.data.prepare.builtin import builtin_corpus
corpus = builtin_corpus(log=print, cache=Path(sys.argv[1]), max_characters={SMALL})
print("prefixes", *[entry.prefix for entry in corpus.entries])
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache):
    return builtin_corpus(log=lambda line: None, cache=cache, max_characters=SMALL)


def test_code_and_prose_of_the_standard_library(corpus):
    assert [entry.corpus for entry in corpus.entries] == ["code", "prose"]
    assert corpus.tokenizer.vocab_size == builtin.BUILTIN_VOCAB_SIZE
    texts = {}
    for entry in corpus.entries:
        dataset = IndexedDataset(entry.prefix)
        documents = [dataset.sequence(i) for i in range(len(dataset))]
        assert all(document[-1] == corpus.tokenizer.eod for document in documents)
        texts[entry.corpus] = corpus.tokenizer.decode(documents[0][:-1].tolist())
        assert not any(corpus.tokenizer.eod in document[:-1] for document in documents[:20])
    import __future__ as first

    assert texts["code"] == Path(first.__file__).read_text(encoding="utf-8")
    assert texts["prose"].startswith(first.__doc__.split("\n")[0])
    report = check_files(corpus.entries, builtin.BUILTIN_VOCAB_SIZE, corpus.tokenizer)
    assert (report.problems, report.without_note) == ((), ())


def test_it_is_made_once(corpus, cache):
    said: list[str] = []
    again = builtin_corpus("BuiltinTokenizer", None, said.append, cache, SMALL)
    assert said == []
    assert again.entries == corpus.entries


def test_it_is_the_same_when_made_again(corpus, tmp_path):
    again = builtin_corpus(log=lambda line: None, cache=tmp_path, max_characters=SMALL)
    for one, two in zip(corpus.entries, again.entries, strict=True):
        assert Path(f"{one.prefix}.bin").read_bytes() == Path(f"{two.prefix}.bin").read_bytes()
    assert corpus.tokenizer_model.read_bytes() == again.tokenizer_model.read_bytes()


def test_another_tokenizer_has_its_own_corpus(cache, corpus):
    said: list[str] = []
    other = builtin_corpus("ByteTokenizer", None, said.append, cache, 50_000)
    assert (other.tokenizer.vocab_size, other.tokenizer_model) == (257, None)
    assert len(said) == 2
    assert other.entries[0].prefix != corpus.entries[0].prefix
    report = check_files(other.entries, 257, other.tokenizer)
    assert report.problems == ()
    assert "another tokenizer" in check_files(other.entries, 4096, corpus.tokenizer).problems[0]


@pytest.mark.parametrize("locks", [True, False])
def test_four_processes_race_for_one_corpus(tmp_path, locks):
    """With locks it is made once; on a file system without them the first one's stays."""
    program = MAKE
    if not locks:
        refuse = "def refuse(*_): raise OSError\nimport fcntl\nfcntl.flock = refuse\n"
        program = refuse + MAKE
    command = [sys.executable, "-c", program, str(tmp_path)]
    makers = [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs = [maker.communicate(timeout=120) for maker in makers]
    assert [maker.returncode for maker in makers] == [0] * 4, outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    made = sum("making" in out for out, _ in outputs)
    assert made == 1 if locks else made >= 1
    left = [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert len(left) == 1
    assert len(IndexedDataset(str(left[0] / "code"))) > 10


def test_a_maker_that_is_killed_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    maker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*partial*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    maker.kill()
    maker.wait()
    assert list(tmp_path.glob(".*partial*"))
    assert not list(tmp_path.glob("builtin*"))
    corpus = builtin_corpus(log=lambda line: None, cache=tmp_path, max_characters=SMALL)
    assert len(IndexedDataset(corpus.entries[0].prefix)) > 10
    assert not list(tmp_path.glob(".*partial*"))


def test_a_damaged_cache_is_refused_with_the_folder_to_remove(tmp_path):
    arguments = ("ByteTokenizer", None, lambda line: None, tmp_path, 50_000)
    folder = Path(builtin_corpus(*arguments).entries[0].prefix).parent
    (folder / "code.bin").write_bytes(b"")
    with pytest.raises(DataError, match=rf"remove {folder}"):
        builtin_corpus(*arguments)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        builtin_corpus("ByteTokenizer", None, print, tmp_path / "file" / "cache")


def test_the_place_of_the_cache():
    assert default_cache({"XDG_CACHE_HOME": "/x", "HOME": "/h"}).parent == Path("/x")
    assert default_cache({"HOME": "/h"}).parent == Path("/h/.cache")


def test_docstrings_come_in_order_of_line_and_broken_files_give_none():
    source = '"""A."""\nclass C:\n  """B."""\n  def f(self):\n    """C."""\ndef g():\n  """D."""\n'
    assert prose_documents([source, "def broken(:", "x = 1\n"]) == ["A.\n\nB.\n\nC.\n\nD.\n"]

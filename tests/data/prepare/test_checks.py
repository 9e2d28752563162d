"""What is looked for in data before step 1, file by file."""

from pathlib import Path

import numpy as np
import pytest

from megatron.config.errors import DataError
from megatron.data.data_list import DataSource
from megatron.data.prepare.checks import WINDOW, check_files
from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import ByteTokenizer, NullTokenizer
from megatron.data.tokenizer_note import note_path, read_note
from tests.data.pairs import idx_bytes, write_tokens


def _file(prefix: str) -> DataSource:
    return DataSource(1.0, prefix, "corpus", 1)


@pytest.fixture
def prefix(tmp_path):
    prefix = write_tokens(tmp_path / "data", np.arange(20 * WINDOW) % 257, documents=3)
    write_note(prefix, ByteTokenizer(), append_eod=True)
    return prefix


def problems(prefix: str, vocab_size: int = 257, tokenizer=None) -> str:
    report = check_files([_file(prefix)], vocab_size, tokenizer or ByteTokenizer())
    if report.problems:
        with pytest.raises(DataError, match=r"data|VOCAB_SIZE"):
            report.raise_problems()
    return "\n".join(report.problems)


def test_good_data_passes(prefix):
    report = check_files([_file(prefix)], 257, ByteTokenizer())
    report.raise_problems()
    assert (report.problems, report.warnings()) == ((), [])


@pytest.mark.parametrize("place", [0, 20 * WINDOW - 1, WINDOW - 1])
def test_an_id_outside_the_vocabulary_is_found_at_the_ends(tmp_path, place):
    tokens = np.zeros(20 * WINDOW, dtype=np.int64)
    tokens[place] = 257
    prefix = write_tokens(tmp_path / "data", tokens)
    found = problems(prefix)
    assert f"data.bin: token {place} has id 257, outside the vocabulary [0, 257)" in found
    assert "TOKENIZER_MODEL" in found


def test_ids_from_another_vocabulary_are_found_in_the_middle(tmp_path):
    tokens = np.zeros(20 * WINDOW, dtype=np.int64)
    tokens[WINDOW:-WINDOW:50] = 300  # neither end shows them
    assert "has id 300" in problems(write_tokens(tmp_path / "data", tokens))


def test_a_negative_id_is_found(tmp_path):
    (tmp_path / "data.bin").write_bytes(np.array([3, -7, 1], dtype="<i4").tobytes())
    (tmp_path / "data.idx").write_bytes(idx_bytes([3], code=4, itemsize=4))
    assert "token 1 has id -7" in problems(str(tmp_path / "data"))


def test_a_damaged_index_and_a_missing_file_are_named(prefix, tmp_path):
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes()[:-8])
    assert "data.idx" in problems(prefix)
    assert "gone.idx does not exist" in "\n".join(
        check_files([_file(str(tmp_path / "gone"))], 257).problems
    )


def test_files_of_one_size_cannot_be_swapped_unseen(prefix, tmp_path):
    other = write_tokens(tmp_path / "other", np.arange(20 * WINDOW)[::-1] % 257, documents=3)
    Path(f"{other}.bin").replace(f"{prefix}.bin")
    assert "data.bin" in problems(prefix)
    assert "swapped" in problems(prefix)


def test_data_of_another_tokenizer_is_refused(prefix):
    assert "made with another tokenizer" in problems(prefix, tokenizer=NullTokenizer(257))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    prefix = write_tokens(tmp_path / "data", np.arange(100))
    assert "VOCAB_SIZE = 200" in problems(prefix, 200)


def test_files_without_a_note_give_one_warning(tmp_path):
    files = [_file(write_tokens(tmp_path / f"data{i}", np.arange(100))) for i in range(3)]
    report = check_files(files, 257, ByteTokenizer())
    assert report.problems == ()
    assert len(report.warnings()) == 1
    assert "3 data file(s)" in report.warnings()[0]


def test_an_unreadable_note_is_refused(prefix):
    note_path(prefix).write_text("{")
    assert "data.tokenizer.json" in problems(prefix)


def test_the_note_says_what_was_written(prefix):
    note = read_note(prefix)
    assert (note.vocab_size, note.eod, note.append_eod) == (257, 256, True)
    assert note.tokenizer == ByteTokenizer().fingerprint()


def test_the_ranks_share_the_files_and_miss_none(tmp_path):
    files = [_file(str(tmp_path / f"gone{i}")) for i in range(7)]
    shares = [check_files(files, 257, None, rank, 3).problems for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert len({line for share in shares for line in share}) == 7
    with pytest.raises(DataError, match="gone0"):
        check_files(files, 257).raise_problems()


def test_the_end_of_documents_is_looked_for_where_something_follows_it(tmp_path):
    with_ends = write_tokens(tmp_path / "with", np.arange(20 * WINDOW) % 257, documents=3)
    without = write_tokens(tmp_path / "without", np.arange(20 * WINDOW) % 200, documents=3)
    long = write_tokens(tmp_path / "long", np.arange(50 * WINDOW) % 200)  # one document: no proof
    files = [_file(prefix) for prefix in (with_ends, without, long)]
    assert not check_files(files, 257, ByteTokenizer()).problems
    (problem,) = check_files(files, 257, ByteTokenizer(), ends=True).problems
    assert problem.startswith(f"{without}.bin: id 256, which ends documents by the tokenizer")
    assert "--append-eod" in problem

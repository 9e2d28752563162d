"""tools/merge_datasets.py: nothing lost, nothing mixed that does not belong together."""

from pathlib import Path

import numpy as np

from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import ByteTokenizer, NullTokenizer
from megatron.data.tokenizer_note import read_note
from tools import merge_datasets


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "<u2") -> str:
    """Documents of several sequences each."""
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            for sequence in document:
                writer.append(sequence)
                writer.end_sequence()
            writer.end_document()
    write_note(str(prefix), ByteTokenizer(), append_eod=False)
    return str(prefix)


def test_sequences_and_documents_follow_one_another(tmp_path, capsys):
    a = write(tmp_path / "in/a", [[[1, 2], [3]], [[4, 5, 6]]])
    b = write(tmp_path / "in/b", [])
    c = write(tmp_path / "in/c", [[[7]], [[], [8, 9]]])
    for inputs in ([a, b, f"{c}.bin"], [str(tmp_path / "in")]):
        output = str(tmp_path / "out/all")
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", output]) == 0
        assert "3 pairs, 4 documents, 9 tokens" in capsys.readouterr().out
        whole = IndexedDataset(output)
        assert [whole.sequence(i).tolist() for i in range(len(whole))] == [
            [1, 2], [3], [4, 5, 6], [7], [], [8, 9],
        ]  # fmt: skip
        assert whole.documents.tolist() == [0, 2, 3, 4, 6]
        assert read_note(output).tokenizer == ByteTokenizer().fingerprint()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "all.bin", "all.idx", "all.tokenizer.json",
        ]  # fmt: skip


def test_what_does_not_belong_together_is_refused(tmp_path, capsys):
    a = write(tmp_path / "a", [[[1]]])
    wide = write(tmp_path / "wide", [[[1]]], "<i4")
    other = write(tmp_path / "other", [[[1]]])
    write_note(other, NullTokenizer(257), append_eod=False)
    for inputs, status, words in [
        ([a, wide], 3, "wide.idx has int32 tokens"),
        ([a, other], 3, "other was made with another tokenizer"),
        ([a, str(tmp_path / "gone")], 3, "gone.idx does not exist"),
        ([str(tmp_path / "out"), a], 2, "is one of the inputs"),
    ]:
        output = str(tmp_path / "out")
        assert merge_datasets.main(["--input", *inputs, "--output-prefix", output]) == status
        assert words in capsys.readouterr().err
        assert not Path(f"{output}.bin").exists()


def test_an_input_without_a_note_leaves_the_output_without_one(tmp_path):
    a, b = write(tmp_path / "a", [[[1]]]), write(tmp_path / "b", [[[2]]])
    Path(f"{b}.tokenizer.json").unlink()
    output = str(tmp_path / "all")
    assert merge_datasets.main(["--input", a, a, "--output-prefix", output]) == 0
    assert read_note(output) is not None
    assert merge_datasets.main(["--input", a, b, "--output-prefix", output]) == 0
    assert read_note(output) is None


def test_notes_are_compared_also_behind_an_input_without_one(tmp_path, capsys):
    a, b, c = (write(tmp_path / name, [[[1]]]) for name in "abc")
    Path(f"{a}.tokenizer.json").unlink()
    write_note(c, NullTokenizer(257), append_eod=False)
    output = str(tmp_path / "all")
    assert merge_datasets.main(["--input", a, b, c, "--output-prefix", output]) == 3
    assert "c was made with another tokenizer or end of document than" in capsys.readouterr().err

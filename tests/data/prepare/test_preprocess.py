"""tools/preprocess_data.py from its front door."""

import gzip
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.data.data_list import parse_data_list
from megatron.data.indexed import IndexedDataset
from megatron.data.prepare import encode, preprocess, text_input
from megatron.data.prepare.builtin import train_sentencepiece
from megatron.data.prepare.plain_tokenizers import ByteTokenizer
from megatron.data.prepare.sharded_writer import ShardedWriter
from megatron.data.prepare.tokenizer import LoadedTokenizer, build_tokenizer
from megatron.data.prepare.words import WordEncoder
from megatron.data.tokenizer_note import read_note
from tests.data.prepare.bpe import write_tokenizer
from tools import preprocess_data

ROOT = Path(__file__).parents[3]
TEXTS = ["abc", "de", "f\u00e4gh\n"]


def write_jsonl(path: Path, documents: list[object]) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def run(tmp_path: Path, *arguments: str, kind: str = "ByteTokenizer") -> int:
    prefix = str(tmp_path / "out" / "data")
    return preprocess_data.main(["--tokenizer-type", kind, "--output-prefix", prefix, *arguments])


def read(tmp_path: Path, key: str = "text") -> list[list[int]]:
    dataset = IndexedDataset(str(tmp_path / "out" / f"data_{key}_document"))
    assert dataset.documents.tolist() == list(range(len(dataset) + 1))
    return [dataset.sequence(i).tolist() for i in range(len(dataset))]


def test_the_end_of_document_is_counted_in_the_lengths(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert run(tmp_path, "--input", path, "--append-eod") == 0
    assert read(tmp_path) == [[*text.encode(), 256] for text in TEXTS]
    index = (tmp_path / "out" / "data_text_document.idx").read_bytes()
    assert struct.unpack_from("<3i", index, 34) == (4, 3, 7)
    assert struct.unpack_from("<3q", index, 34 + 12) == (0, 8, 14)
    note = read_note(str(tmp_path / "out" / "data_text_document"))
    assert (note.tokenizer, note.append_eod) == (ByteTokenizer().fingerprint(), True)


def test_without_append_eod_no_id_is_added(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert run(tmp_path, "--input", path) == 0
    assert read(tmp_path) == [list(text.encode()) for text in TEXTS]


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(text_input, "UNIT_BYTES", 1000)  # many units
    model = tmp_path / "sp.model"
    lines = [f"the quick brown fox number {i} jumps over {i * 7} lazy dogs" for i in range(500)]
    model.write_bytes(train_sentencepiece([["\n".join(lines)]], 300))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": line} for line in lines])
    results = []
    for workers in ("1", "3"):
        arguments = ("--input", path, "--tokenizer-model", str(model), "--workers", workers)
        assert run(tmp_path, *arguments, kind="SentencePieceTokenizer") == 0
        pair = [(tmp_path / "out" / f"data_text_document.{s}").read_bytes() for s in ("bin", "idx")]
        results.append(pair)
    assert results[0] == results[1]
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(model))
    assert read(tmp_path) == [tokenizer.encode(line) for line in lines]


def test_workers_get_a_loaded_tokenizer(tmp_path):
    texts = ["a b <|endoftext|> c", "\u00e9t\u00e9 12  x", TEXTS[2]]
    model = write_tokenizer(tmp_path / "t", "smollm2", TEXTS)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    arguments = ("--input", path, "--tokenizer-model", model, "--workers", "2", "--append-eod")
    assert run(tmp_path, *arguments, kind="HFTokenizer") == 0
    tokenizer = build_tokenizer("HFTokenizer", model)
    assert read(tmp_path) == [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    loaded = LoadedTokenizer(tokenizer.definition(), tokenizer.vocab_size, tokenizer.eod)
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_globs_keys_and_blank_lines(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"title": "t2", "text": "two"}])
    write_jsonl(tmp_path / "a.jsonl", [{"title": "t1", "text": "one"}])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n  \n")
    arguments = ("--input", f"{tmp_path}/*.jsonl", "--json-keys", "text", "title")
    assert run(tmp_path, *arguments) == 0
    assert read(tmp_path, "text") == [list(b"one"), list(b"two")]
    assert read(tmp_path, "title") == [list(b"t1"), list(b"t2")]


def test_a_text_file_is_one_document_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr(text_input, "PIECE_CHARACTERS", 40)
    texts = ["".join(f"line {i}\r\n" for i in range(50)) + "x" * 500, "short", ""]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    assert run(tmp_path, "--input", f"{tmp_path}/*.txt", "--append-eod") == 0
    assert read(tmp_path) == [[*text.encode(), 256] for text in texts[:2]]


def _documents(count: int) -> list[dict[str, str]]:
    return [
        {"id": str(i), "text": f"document {i} " * (i % 23) + "\u00e9 end\n"} for i in range(count)
    ]


def _as(path: Path, documents: list[dict[str, str]], suffix: str) -> str:
    lines = "".join(json.dumps(document) + "\n" for document in documents).encode()
    file = path / f"in{suffix}"
    if suffix.endswith(".gz"):
        half = len(lines) // 2  # two members, as `cat a.gz b.gz` makes
        file.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        compressor = zstandard.ZstdCompressor()
        half = len(lines) // 2
        file.write_bytes(compressor.compress(lines[:half]) + compressor.compress(lines[half:]))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(documents)
        pytest.importorskip("pyarrow.parquet").write_table(table, file, row_group_size=90)
    else:
        file.write_bytes(lines)
    return str(file)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch, suffix, workers):
    monkeypatch.setattr(text_input, "UNIT_BYTES", 3000)  # many units
    documents = _documents(400)
    path = _as(tmp_path, documents, suffix)
    assert run(tmp_path, "--input", path, "--append-eod", "--workers", workers) == 0
    assert read(tmp_path) == [[*document["text"].encode(), 256] for document in documents]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("fault", ["short", "bits"])
def test_a_damaged_file_is_refused(tmp_path, capsys, suffix, fault):
    path = Path(_as(tmp_path, _documents(400), suffix))
    whole = path.read_bytes()
    middle = len(whole) // 4
    bits = bytes(255 - byte for byte in whole[middle : middle + 40])
    path.write_bytes(
        whole[:-10] if fault == "short" else whole[:middle] + bits + whole[middle + 40 :]
    )
    assert run(tmp_path, "--input", str(path)) == 3
    assert f"in{suffix}: damaged or truncated" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_giant_document_is_split_before_it_is_tokenised(tmp_path, monkeypatch):
    tokenizer = build_tokenizer("HFTokenizer", write_tokenizer(tmp_path / "t", "llama3", TEXTS))
    giant = "".join(f"word{i}, ({i})  x\n" for i in range(3000))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": giant}, {"text": "c"}])
    longest = []
    encode_batch = type(tokenizer).encode_batch

    def noted(self, texts):
        longest.append(max(map(len, texts), default=0))
        return encode_batch(self, texts)

    monkeypatch.setattr(type(tokenizer), "encode_batch", noted)
    monkeypatch.setattr(encode, "WordEncoder", _Whole)
    monkeypatch.setattr(text_input, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(encode, "_ENCODERS", {})
    arguments = ("--input", path, "--tokenizer-model", str(tmp_path / "t"))
    assert run(tmp_path, *arguments, kind="HFTokenizer") == 0
    assert max(longest) <= 1000 < len(giant)
    assert read(tmp_path) == [tokenizer.encode(text) for text in ("a b", giant, "c")]


class _Whole(WordEncoder):
    """Asks the tokenizer for whole pieces."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.borders = None


def test_bad_lines_keep_their_numbers_over_units_and_restarts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_input, "UNIT_BYTES", 300)
    lines = [json.dumps({"text": f"line {i}"}) for i in range(1, 101)]
    lines[36] = lines[73] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert run(tmp_path, "--input", str(tmp_path / "a.jsonl"), "--workers", "2") == 0
    said = capsys.readouterr().err
    assert "a.jsonl:37: " in said and "a.jsonl:74: " in said
    assert len(read(tmp_path)) == 98


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt"])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys, suffix):
    """Stopped at every unit in turn, whatever of the next one had been written."""
    monkeypatch.setattr(text_input, "UNIT_BYTES", 700)
    monkeypatch.setattr(text_input, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(preprocess, "SAVE_SECONDS", 0.0)
    documents = _documents(40)
    if suffix == ".txt":
        path = str(tmp_path / "in.txt")
        Path(path).write_text("".join(document["text"] for document in documents))
    else:
        path = _as(tmp_path, documents, suffix)
    assert run(tmp_path, "--input", path, "--append-eod") == 0
    whole = [(tmp_path / "out" / f"data_text_document.{s}").read_bytes() for s in ("bin", "idx")]
    for name in ("bin", "idx", "tokenizer.json"):
        (tmp_path / "out" / f"data_text_document.{name}").unlink()
    (tmp_path / "out" / "data.list").unlink()
    append, stops = ShardedWriter.append, 0

    def stopped_after_one(self, unit, *arguments):
        nonlocal stops
        if unit > first:
            append(self, unit, *arguments)  # not noted in the journal: must be cut off
            stops += 1
            raise KeyboardInterrupt
        append(self, unit, *arguments)

    monkeypatch.setattr(ShardedWriter, "append", stopped_after_one)
    first = 0
    while (status := run(tmp_path, "--input", path, "--append-eod")) != 0:
        assert status == 130
        assert "the same command resumes" in capsys.readouterr().err
        assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["data.partial"]
        first += 1
    assert stops >= 3
    assert whole == [
        (tmp_path / "out" / f"data_text_document.{s}").read_bytes() for s in ("bin", "idx")
    ]
    assert not (tmp_path / "out" / "data.partial").exists()


def test_an_interruption_at_any_renaming_is_repaired(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "d"}])
    suffixes = ("bin", "idx", "tokenizer.json")
    pair = [tmp_path / "out" / f"data_text_document.{suffix}" for suffix in suffixes]
    assert run(tmp_path, "--input", path) == 0
    whole = [file.read_bytes() for file in pair]
    replace, calls, last = os.replace, 0, 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", interrupted)
    status = 130
    while status == 130:
        for file in pair:
            file.unlink(missing_ok=True)
        calls, last = 0, last + 1
        status = run(tmp_path, "--input", path)
        assert status == 0 or run(tmp_path, "--input", path) == 0
        assert [file.read_bytes() for file in pair] == whole
    assert last > 4  # journal, complete journal, tokens, index, note


def test_other_input_does_not_go_on_from_it(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "d"}])
    monkeypatch.setattr(ShardedWriter, "commit", stopped)
    assert run(tmp_path, "--input", path) == 130
    monkeypatch.undo()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "xyz"}])
    assert run(tmp_path, "--input", path) == 0
    assert read(tmp_path) == [list(b"xyz")]


def test_two_processes_do_not_write_one_output(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    prefix = str(tmp_path / "out" / "data_text_document")
    other = ShardedWriter([prefix], np.dtype("<u2"), tmp_path / "out" / "data.partial", "other")
    assert run(tmp_path, "--input", path) == 2
    assert "another process writes this output" in capsys.readouterr().err
    other.close()


@pytest.mark.long
def test_a_killed_command_goes_on_and_memory_does_not_grow(tmp_path):
    """SIGKILL at several moments; the peak memory of 16 times the input is that of the input."""
    peaks = {}
    for name, copies in (("small", 1), ("large", 16)):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for i in range(16000 * copies):
                file.write(json.dumps({"text": f"some words of document {i} " * 40}) + "\n")
        command = [
            sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input",
            str(tmp_path / f"{name}.jsonl"), "--tokenizer-type", "ByteTokenizer",
            "--output-prefix", str(tmp_path / name),
        ]  # fmt: skip
        whole = [sys.executable, "-c", _PEAK, *command]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout)
    assert peaks["large"] < peaks["small"] * 1.2
    wanted = (tmp_path / "large_text_document.bin").read_bytes()
    for suffix in ("bin", "idx", "tokenizer.json"):
        (tmp_path / f"large_text_document.{suffix}").unlink()
    for seconds in (0.7, 1.4, 2.1):
        child = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        child.kill()
        child.wait()
    assert subprocess.run(command, capture_output=True, timeout=280).returncode == 0
    assert (tmp_path / "large_text_document.bin").read_bytes() == wanted


_PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def test_empty_documents_are_left_out_unless_they_have_an_end(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert run(tmp_path, "--input", path) == 0
    assert read(tmp_path) == [[97], [98]]
    assert run(tmp_path, "--input", path, "--append-eod") == 0
    assert read(tmp_path) == [[97, 256], [256], [98, 256]]


def _bad_file(path: Path) -> str:
    lines = [
        b'{"text": "ok"}',
        b"{",
        b"[1]",
        b'{"other": "x"}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def test_bad_lines_are_counted_and_shown(tmp_path, capsys):
    path = _bad_file(tmp_path / "a.jsonl")
    assert run(tmp_path, "--input", path, "--max-bad-lines", "5") == 0
    assert read(tmp_path) == [list(b"ok")]
    said = capsys.readouterr().err
    for number in range(2, 7):
        assert f"a.jsonl:{number}: " in said
    assert "5 bad lines" in said


def test_too_many_bad_lines_are_refused_and_leave_no_file(tmp_path, capsys):
    path = _bad_file(tmp_path / "a.jsonl")
    assert run(tmp_path, "--input", path, "--max-bad-lines", "4") == 3
    assert "5 bad lines, more than --max-bad-lines 4" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_run_keeps_the_old_pair(tmp_path):
    good = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}])
    assert run(tmp_path, "--input", good) == 0
    assert run(tmp_path, "--input", _bad_file(tmp_path / "b.jsonl"), "--max-bad-lines", "0") == 3
    assert read(tmp_path) == [list(b"abc")]


def test_characters_make_their_own_alphabet(tmp_path):
    (tmp_path / "a.txt").write_text("hello world\n")
    assert run(tmp_path, "--input", str(tmp_path / "a.txt"), kind="CharTokenizer") == 0
    tokenizer = build_tokenizer("CharTokenizer", str(tmp_path / "out" / "data_alphabet.json"))
    assert tokenizer.vocab_size == len(set("hello world\n")) + 1
    assert tokenizer.decode(read(tmp_path)[0]) == "hello world\n"


def test_a_folder_is_its_text_and_the_list_is_written(tmp_path, capsys):
    for name, text in {"b/two.txt": "two", "a.md": "# one", "c.png": "\0"}.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    assert run(tmp_path, "--input", str(tmp_path / "in")) == 0
    assert read(tmp_path) == [list(b"# one"), list(b"two")]
    said, path = capsys.readouterr().err, tmp_path / "out" / "data.list"
    assert "in: 1 files of other kinds were left out" in said
    assert f"train on it: DATA_FILE_LIST={path} bash train_alcf.sh" in said
    (source,) = parse_data_list(path)
    assert (source.corpus, source.prefix) == ("in", str(tmp_path / "out" / "data_text_document"))


def test_a_pair_and_a_corpus_for_each_folder_or_file(tmp_path, capsys):
    for name, text in {"law/1.txt": "a" * 30, "law/2.txt": "b" * 30, "code.txt": "c" * 20}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    given = ("--input", str(tmp_path / "law"), str(tmp_path / "code.txt"))

    def weights() -> dict[str, float]:
        sources = parse_data_list(tmp_path / "out" / "data.list")
        assert all(f"data_{s.corpus}_text_document" in s.prefix for s in sources)
        return {source.corpus: source.weight for source in sources}

    assert run(tmp_path, *given, "--per-folder") == 0
    assert weights() == {"law": 0.75, "code": 0.25}
    assert run(tmp_path, *given, "--per-file") == 0
    assert weights() == {"1": 0.375, "2": 0.375, "code": 0.25}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "law").symlink_to(tmp_path / "law")
    assert (
        run(tmp_path, "--input", str(tmp_path / "law"), str(tmp_path / "x/law"), "--per-folder")
        == 2
    )
    assert "two corpora would be named law" in capsys.readouterr().err


def test_the_built_in_tokenizer_is_copied_beside_the_pair(tmp_path, monkeypatch):
    model = tmp_path / "m"
    model.write_bytes(train_sentencepiece([[" ".join(f"word{i}" for i in range(300))]], 300))
    monkeypatch.setattr(preprocess_data, "builtin_model", lambda: str(model))
    (tmp_path / "a.txt").write_text("word1 word2")
    assert run(tmp_path, "--input", str(tmp_path / "a.txt"), kind="BuiltinTokenizer") == 0
    note = read_note(str(tmp_path / "out" / "data_text_document"))
    assert (note.kind, note.model) == ("BuiltinTokenizer", "./data_tokenizer.model")
    assert (tmp_path / "out" / "data_tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--input", "nothing*.jsonl"], 3, "does not exist"),
        (["--input", "a.zip"], 3, "is no text"),
        (["--input", "a.txt", "--json-keys", "a", "b"], 2, "plain text has no keys"),
        (["--input", "a.txt", "--json-keys", "a", "a"], 2, "keys"),
        (["--input", "a.txt", "--vocab-file", "v"], 2, "go together"),
        (["--input", "latin.txt"], 3, r"latin.txt: not UTF-8"),
        (["--input", "empty.jsonl"], 3, "is empty"),
        (["--input", "blank.jsonl"], 3, "no document"),
    ],
)
def test_bad_input_is_refused_with_its_status(
    tmp_path, monkeypatch, capsys, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    for name, content in [
        ("a.txt", b"x"),
        ("a.zip", b"PK\0"),
        ("latin.txt", b"\xe4"),
        ("empty.jsonl", b""),
        ("blank.jsonl", b"\n"),
    ]:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path, *arguments) == status
    assert message in capsys.readouterr().err


def test_as_a_command(tmp_path):
    """Run as users do: from another folder, with progress on stderr and a pool of processes."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    command = [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", path,
        "--tokenizer-type", "ByteTokenizer", "--output-prefix", "data", "--workers", "2",
        "--log-interval", "0",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    assert "documents/s" in done.stderr
    assert "tokens/s" in done.stderr
    assert (tmp_path / "data_text_document.idx").exists()
    wrong = subprocess.run([*command[:-2], "--workers", "0"], capture_output=True, timeout=60)
    assert wrong.returncode == 2

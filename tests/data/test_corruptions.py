"""Every fault that data is known to have had is refused before step 1, with file and fix."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import ByteTokenizer
from tests.data.pairs import idx_bytes, write_tokens
from tests.data.started import start
from tests.spawn import run

COUNT = 40_000
SETTINGS = {"TOKENIZER_TYPE": "ByteTokenizer", "SEQ": "64", "TRAIN_ITERS": "4"}


def write_data(folder: Path) -> None:
    lines = []
    for number in range(2):
        tokens = np.random.default_rng(number).integers(0, 256, COUNT)
        prefix = write_tokens(folder / f"part{number}", tokens, documents=40)
        write_note(prefix, ByteTokenizer(), append_eod=False)
        lines.append(f"1 {prefix} books\n")
    (folder / "list.txt").write_text("".join(lines))


def started(folder: Path, **settings: str) -> tuple[int, str]:
    given = {**SETTINGS, "DATA_FILE_LIST": str(folder / "list.txt"), **settings}
    return run(start, 1, {**given, "RUN_DIR": str(folder / "run")})[0]


def truncated(suffix: str, share: float) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / f"part1.{suffix}"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return corrupt


def dtype_byte(code: int) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "part1.idx"
        content = bytearray(path.read_bytes())
        content[17] = code
        path.write_bytes(content)

    return corrupt


def id_at(value: int, without_note: bool) -> Callable[[Path], None]:
    """One bad id in each thousand, as from another vocabulary."""

    def corrupt(folder: Path) -> None:
        tokens = np.random.default_rng(1).integers(0, 256, COUNT)
        tokens[500::1000] = value
        (folder / "part1.bin").write_bytes(tokens.astype("<i4").tobytes())
        lengths = [COUNT // 40] * 40
        (folder / "part1.idx").write_bytes(idx_bytes(lengths, code=4, itemsize=4))
        if without_note:
            (folder / "part1.tokenizer.json").unlink()

    return corrupt


def swapped_bins(folder: Path) -> None:
    a, b = folder / "part0.bin", folder / "part1.bin"
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def swapped_with_another_size(folder: Path) -> None:
    write_tokens(folder / "other", np.zeros(COUNT + 64), documents=40)
    shutil.copy(folder / "other.bin", folder / "part1.bin")


def int32_under_a_uint16_index(folder: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, COUNT)
    (folder / "part1.bin").write_bytes(tokens.astype("<i4").tobytes())


def wrong_pointer(folder: Path) -> None:
    path = folder / "part1.idx"
    content = bytearray(path.read_bytes())
    struct.pack_into("<q", content, 34 + 4 * 40 + 8 * 7, 6)
    path.write_bytes(content)


def missing(folder: Path) -> None:
    (folder / "part1.bin").unlink()


FAULTS = {
    "bin truncated by half": (truncated("bin", 0.5), "part1.bin has 40000 bytes"),
    "bin empty": (truncated("bin", 0.0), "part1.bin has 0 bytes"),
    "idx truncated by half": (truncated("idx", 0.5), "part1.idx has"),
    "idx truncated in its header": (truncated("idx", 0.02), "part1.idx"),
    "dtype byte int32": (dtype_byte(4), "part1.bin has 80000 bytes"),
    "dtype byte uint8": (dtype_byte(1), "part1.bin has 80000 bytes"),
    "dtype byte float": (dtype_byte(7), "part1.idx has dtype code 7"),
    "int32 tokens, uint16 index": (int32_under_a_uint16_index, "part1.bin has 160000 bytes"),
    "ids beyond the vocabulary": (id_at(300, True), "part1.bin: token 500 has id 300"),
    "negative ids": (id_at(-1, True), "part1.bin: token 500 has id -1"),
    "swapped bins of one size": (swapped_bins, "part1.bin: not the data that"),
    "swapped bins, other sizes": (swapped_with_another_size, "part1.bin has 80128 bytes"),
    "wrong pointer": (wrong_pointer, "part1.idx: sequence 7 has byte offset 6"),
    "missing file": (missing, "part1.bin does not exist"),
}
FIXES = ("make", "copy", "correct the path", "set TOKENIZER_TYPE", "remove it from", "Copy")


def test_good_data_starts(tmp_path):
    write_data(tmp_path)
    assert started(tmp_path) == (0, "")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_with_file_and_fix(tmp_path, fault):
    corrupt, words = FAULTS[fault]
    write_data(tmp_path)
    corrupt(tmp_path)
    status, message = started(tmp_path)
    assert status == 3
    assert words in message
    assert any(fix in message for fix in FIXES), message


def test_another_tokenizer_is_refused(tmp_path):
    write_data(tmp_path)
    status, message = started(tmp_path, TOKENIZER_TYPE="NullTokenizer", VOCAB_SIZE="257")
    assert status == 3
    assert "part0.bin: made with another tokenizer" in message
    assert "set TOKENIZER_TYPE and TOKENIZER_MODEL" in message
    assert started(tmp_path, VOCAB_SIZE="200")[0] == 3

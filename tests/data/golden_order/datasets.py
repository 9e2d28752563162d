"""The small data sets of the recorded orders, drawn from numpy's legacy generator, whose stream is
frozen: every numpy version gives the same bytes, which are held against their SHA-256.

Flavours: `plain` has a document a sequence; `multi` has documents of 1, 2, 3, 1, 2, 3, ...
sequences; in `zeros` every fifth sequence and the last are empty.
"""

import hashlib
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Spec(NamedTuple):
    name: str
    dtype: str
    sequences: int
    longest: int  # lengths are 1 .. longest
    largest: int  # token ids are 0 .. largest
    seed: int
    flavour: str
    sha256: str  # of .bin followed by .idx, the first 16 digits


FILES = [
    Spec("wiki/part_0_text_document", "uint16", 400, 200, 65535, 101, "plain", "0f71d9f987aacce2"),
    Spec("wiki/part_1_text_document", "uint16", 120, 200, 31999, 102, "multi", "44e54b9f826efffc"),
    Spec("books/part_0_text_document", "int32", 250, 200, 255999, 103, "plain", "35057471edfe3970"),
    Spec("books/part_1_text_document", "uint16", 60, 200, 31999, 104, "plain", "1503237c2be0b027"),
    Spec("code/part_0_text_document", "int32", 7, 200, 255999, 105, "plain", "db37d49c5b037d39"),
    Spec("code/part_1_text_document", "int32", 90, 200, 255999, 106, "multi", "d985ec2e9911c4d1"),
    Spec("edge/zeros_text_document", "uint16", 53, 40, 31999, 107, "zeros", "8dd9ff7d7b5ab344"),
    Spec("edge/ones_text_document", "uint16", 150, 2, 31999, 108, "plain", "0f5536a03bab9e36"),
]


def write_all(folder: Path) -> None:
    """Write every data set below `folder`."""
    for spec in FILES:
        tokens, index = _make(spec)
        assert hashlib.sha256(tokens + index).hexdigest().startswith(spec.sha256), spec.name
        path = folder / spec.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.bin").write_bytes(tokens)
        Path(f"{path}.idx").write_bytes(index)


def _make(spec: Spec) -> tuple[bytes, bytes]:
    """`.bin` and `.idx`; lengths are drawn first, then all tokens."""
    rng = np.random.RandomState(spec.seed)
    lengths = rng.randint(1, spec.longest + 1, size=spec.sequences, dtype=np.int64)
    if spec.flavour == "zeros":
        lengths[::5] = 0
        lengths[-1] = 0
    tokens = rng.randint(0, spec.largest + 1, size=int(lengths.sum()), dtype=np.int64)
    code, size = {"int32": (4, 4), "uint16": (8, 2)}[spec.dtype]
    documents = list(range(spec.sequences + 1))
    if spec.flavour == "multi":
        documents = [0]
        while documents[-1] < spec.sequences:
            step = 1 + (len(documents) - 1) % 3
            documents.append(min(spec.sequences, documents[-1] + step))
    offsets = (np.cumsum(lengths) - lengths) * size
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, spec.sequences, len(documents))
    index += lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()
    return tokens.astype(f"<u{size}").tobytes(), index + np.array(documents, "<i8").tobytes()

"""Token files and lists for these tests, written from the format's text and not by our writer."""

import random
import struct
from pathlib import Path

import numpy as np

from megatron.data.data_list import DataSource

# Files and share of each corpus of a well-known 14-corpus mix, the case the order must hold for.
MIX = {
    "algebraic": (16, 0.0171), "arxiv": (100, 0.0301), "books": (3, 0.0072), "c4": (171, 0.0390),
    "crawl": (1107, 0.3540), "falcon": (500, 0.1764), "megawiki": (262, 0.0065),
    "web-math": (13, 0.0174), "papers": (26, 0.0685), "reddit": (78, 0.0442),
    "exchange": (26, 0.0263), "code": (49, 0.1897), "tulu": (66, 0.0182), "wiki": (2, 0.0054),
}  # fmt: skip


def mix_weights() -> dict[str, list[float]]:
    """2,419 file weights by corpus, unequal within a corpus as real shards are."""
    draw = random.Random(7)
    weights = {}
    for corpus, (files, share) in MIX.items():
        sizes = [draw.lognormvariate(0, 0.5) for _ in range(files)]
        weights[corpus] = [share * size / sum(sizes) for size in sizes]
    return weights


def idx_bytes(lengths: list[int], code: int = 8, itemsize: int = 2) -> bytes:
    """An `.idx` with a document a sequence."""
    pointers = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    documents = range(len(lengths) + 1)
    return (
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(lengths) + 1}q", *documents)
    )


def write_tokens(prefix: Path, tokens: np.ndarray, documents: int = 1) -> str:
    """A uint16 pair of `tokens` in `documents` nearly equal documents; returns the prefix."""
    cuts = np.linspace(0, len(tokens), documents + 1).astype(int)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(tokens.astype("<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(idx_bytes([int(n) for n in np.diff(cuts)]))
    return str(prefix)


def write_list(
    folder: Path, sizes: dict[str, list[int]], weights: dict[str, float] | None = None
) -> list[DataSource]:
    """A list of files whose tokens count up within each file: token t of a file is t % 60000."""
    entries = []
    for corpus, tokens in sizes.items():
        for number, count in enumerate(tokens):
            prefix = write_tokens(folder / corpus / f"part{number}", np.arange(count) % 60000)
            weight = (weights or {}).get(corpus, 1.0)
            entries.append(DataSource(weight, prefix, corpus, len(entries) + 1))
    return entries

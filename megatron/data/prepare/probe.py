"""What tells one tokenizer from another: its vocabulary, and how it cuts a text that shows much."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

# Covers digits, case, runs of spaces, newlines, accents and other scripts: what tokenizers of one
# vocabulary but other merges or normalisation split in other ways.
_PROBE = (
    "The year 2024: 1,234.5 kg  of\n\n\tna\u00efve code() {x = y+1;} DON'T "
    "\u4f60\u597d \u0416\u0443\u043a \U0001f600"
)


def fingerprint_of(pieces: Sequence[str], eod: int, encode: Callable[[str], list[int]]) -> str:
    """SHA-256 of a vocabulary, its end of document and the ids of a probe.

    Not of the tokenizer's file: its text changes between versions of a library while the ids do
    not.
    """
    parts = [list(pieces), eod, encode(_PROBE)]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

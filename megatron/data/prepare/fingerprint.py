"""Writes the note beside a pair (data/tokenizer_note.py) with the digest that belongs to it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import NamedTuple

from megatron.checkpoint.atomic import write_atomically
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.data.tokenizer_note import Note, kept_model, note_path

_END_BYTES = 1 << 16


class Named(NamedTuple):
    """A tokenizer as a user names it: TOKENIZER_TYPE and TOKENIZER_MODEL."""

    kind: str | None = None
    model: str | None = None


NAMELESS = Named()


def write_note(
    prefix: str, tokenizer: Tokenizer, append_eod: bool, named: Named = NAMELESS
) -> None:
    """Write the note of a finished pair."""
    save_note(
        prefix,
        Note(
            tokenizer.fingerprint(),
            tokenizer.vocab_size,
            tokenizer.eod,
            append_eod,
            data_digest(prefix),
            named.kind,
            kept_model(named.model, prefix),
        ),
    )


def save_note(prefix: str, note: Note) -> None:
    """Write a note beside a pair."""
    content = json.dumps(asdict(note), indent=1) + "\n"
    write_atomically(note_path(prefix), content, durable=False)


def data_digest(prefix: str) -> str:
    """Hash of the size, the first and the last 64 KiB of `<prefix>.bin`."""
    digest = hashlib.blake2b(digest_size=16)
    with open(f"{prefix}.bin", "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode())
        digest.update(file.read(_END_BYTES))
        file.seek(max(size - _END_BYTES, 0))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()

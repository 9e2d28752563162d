"""The note beside each pair that names the tokenizer that made it: `<prefix>.tokenizer.json`.

It also holds a digest of the ends of `.bin`, to detect swapped files of one size.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import DataError
from megatron.data.prepare.tokenizer import Tokenizer

_END_BYTES = 1 << 16


@dataclass(frozen=True)
class Note:
    """The content of `<prefix>.tokenizer.json`."""

    tokenizer: str  # Tokenizer.fingerprint()
    vocab_size: int
    eod: int
    append_eod: bool  # whether each document ends with eod
    data: str  # digest of the first and last bytes of .bin


def note_path(prefix: str) -> Path:
    """Path of the note of a pair."""
    return Path(f"{prefix}.tokenizer.json")


def write_note(prefix: str, tokenizer: Tokenizer, append_eod: bool) -> None:
    """Write the note of a finished pair."""
    maker = tokenizer.fingerprint(), tokenizer.vocab_size, tokenizer.eod
    save_note(prefix, Note(*maker, append_eod, data_digest(prefix)))


def save_note(prefix: str, note: Note) -> None:
    """Write a note beside a pair."""
    content = json.dumps(asdict(note), indent=1) + "\n"
    write_atomically(note_path(prefix), content, durable=False)


def read_note(prefix: str) -> Note | None:
    """Note of a pair, None where there is none.

    Raises:
        DataError: it cannot be read.
    """
    path = note_path(prefix)
    try:
        return Note(**json.loads(path.read_text(encoding="ascii")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: not a tokenizer note ({error}); make the pair again, or remove it"
        ) from error


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

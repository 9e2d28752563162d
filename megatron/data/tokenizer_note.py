"""The note beside each pair that names the tokenizer that made it: `<prefix>.tokenizer.json`.

Read without a library: a list's tokenizer is known before a run starts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import DataError


@dataclass(frozen=True)
class Note:
    """The content of `<prefix>.tokenizer.json`.

    Attributes:
        tokenizer: its fingerprint.
        vocab_size: one above its largest id.
        eod: its id that ends a document.
        append_eod: whether each document ends with `eod`.
        data: digest of the first and last bytes of .bin, to detect swapped files of one size.
        kind: TOKENIZER_TYPE; None in the notes of older versions.
        model: TOKENIZER_MODEL: a name, or paths (comma between two) that are absolute or, with
            `./` before them, relative to the note's folder.
    """

    tokenizer: str
    vocab_size: int
    eod: int
    append_eod: bool
    data: str
    kind: str | None = None
    model: str | None = None

    @property
    def maker(self) -> tuple[str, int, int, bool]:
        """What the parts of a merged pair must agree on."""
        return *self.ids, self.append_eod

    @property
    def ids(self) -> tuple[str, int, int]:
        """What the pairs of one list must agree on."""
        return self.tokenizer, self.vocab_size, self.eod

    @property
    def named(self) -> str:
        """The tokenizer in a message."""
        words = [word for word in (self.kind, self.model) if word]
        return " ".join([*words, f"({self.tokenizer[:12]}, vocabulary {self.vocab_size})"])


def note_path(prefix: str) -> Path:
    """Path of the note of a pair."""
    return Path(f"{prefix}.tokenizer.json")


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


def kept_model(model: str | None, prefix: str) -> str | None:
    """TOKENIZER_MODEL as a note of `prefix` keeps it: files beside the pair move with it."""
    if model is None:
        return None
    parts, folder = model.split(","), Path(prefix).parent.resolve()
    if not all(Path(part).expanduser().exists() for part in parts):
        return model  # a name on the Hub
    paths = [Path(part).expanduser().resolve() for part in parts]
    beside = [path.is_relative_to(folder) for path in paths]
    return ",".join(
        f"./{path.relative_to(folder)}" if inside else str(path)
        for path, inside in zip(paths, beside, strict=True)
    )


def model_of(note: Note, prefix: str) -> str | None:
    """TOKENIZER_MODEL of a note.

    Raises:
        DataError: its file is no longer where it was.
    """
    if note.model is None:
        return None
    parts = note.model.split(",")
    folder = os.path.dirname(prefix) or "."
    paths = [
        os.path.normpath(os.path.join(folder, part)) if part.startswith("./") else part
        for part in parts
    ]
    kept = [path for path, part in zip(paths, parts, strict=True) if part[:1] in (".", "/")]
    gone = next((path for path in kept if not Path(path).exists()), None)
    if gone is not None:
        raise DataError(
            f"{note_path(prefix)}: the data was made with {note.kind} {gone}, which is no longer "
            f"there; put it back, or set TOKENIZER_TYPE={note.kind} TOKENIZER_MODEL=<where it is "
            "now> (another tokenizer is refused)"
        )
    return ",".join(paths)


def one_note(prefixes: Iterable[str]) -> tuple[str, Note] | None:
    """The first of some pairs and its note, which those of the others agree with.

    Returns:
        None where the first has no note that names its tokenizer: no other one is read.

    Raises:
        DataError: two notes are of different tokenizers, or one cannot be read.
    """
    prefixes = list(prefixes)
    note = read_note(prefixes[0]) if prefixes else None
    if note is None or note.kind is None:
        return None
    require_one_tokenizer(prefixes)
    return prefixes[0], note


def require_one_tokenizer(prefixes: Iterable[str]) -> None:
    """Raise a DataError where the notes of some pairs are of different tokenizers."""
    first: tuple[str, Note] | None = None
    for prefix in prefixes:
        note = read_note(prefix)
        if note and first and note.ids != first[1].ids:
            raise DataError(_differ(first, (prefix, note)))
        if note and not first:
            first = prefix, note


def other_tokenizers(prefixes: Iterable[str]) -> list[tuple[str, str]]:
    """(prefix, problem) of each pair whose tokenizer is not that of most of them."""
    notes: dict[str, Note] = {}
    for prefix in prefixes:
        with contextlib.suppress(DataError):  # said of its file
            note = read_note(prefix)
            if note:
                notes[prefix] = note
    kinds = Counter(note.ids for note in notes.values()).most_common()
    if len(kinds) < 2:
        return []
    usual = next(pair for pair in notes.items() if pair[1].ids == kinds[0][0])
    return [
        (prefix, _differ(usual, (prefix, note)))
        for prefix, note in notes.items()
        if note.ids != usual[1].ids
    ]


def _differ(first: tuple[str, Note], other: tuple[str, Note]) -> str:
    return (
        f"{other[0]}.bin was made with {other[1].named}, {first[0]}.bin with {first[1].named}: the "
        "files of a list have one tokenizer; make one of them again, or leave it out"
    )

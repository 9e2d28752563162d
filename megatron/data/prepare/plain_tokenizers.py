"""Tokenizers that need no library: bytes, characters, and numbers that are ids already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron.config.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"
# Covers digits, case, runs of spaces, newlines, accents and other scripts: tokenizers with one
# vocabulary but different merges or normalisation split these differently.
_PROBE = (
    "The year 2024: 1,234.5 kg  of\n\n\tna\u00efve code() {x = y+1;} DON'T "
    "\u4f60\u597d \u0416\u0443\u043a \U0001f600"
)


def fingerprint_of(pieces: Sequence[str], eod: int, encode: Callable[[str], list[int]]) -> str:
    """SHA-256 of a vocabulary, its end of document and the ids of a probe.

    Not of the tokenizer's file: its text changes between versions of a library, the ids do not.
    """
    parts = [list(pieces), eod, encode(_PROBE)]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


class _TextByText:
    """Encodes several texts one after the other."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]


class ByteTokenizer(_TextByText):
    """UTF-8 bytes as ids 0..255; 256 ends a document."""

    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> list[int]:
        """Bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of bytes; what is no UTF-8 shows as the replacement character, 256 as nothing."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """Constant: there is one such tokenizer."""
        return fingerprint_of(["bytes"], self.eod, self.encode)


class CharTokenizer(_TextByText):
    """One id per character of a fixed alphabet; the id after the last ends a document."""

    def __init__(self, alphabet: Sequence[str]) -> None:
        """Tokenizer of an alphabet of different single characters."""
        self.alphabet = tuple(alphabet)
        self._ids = {character: i for i, character in enumerate(self.alphabet)}

    @classmethod
    def load(cls, path: str) -> CharTokenizer:
        """Tokenizer of an alphabet file: a JSON list of characters and, last, `<|endoftext|>`."""
        try:
            pieces = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"TOKENIZER_MODEL={path} is not a readable alphabet file ({error})"
            ) from error
        if not isinstance(pieces, list) or pieces[-1:] != [END_OF_TEXT]:
            raise ConfigError(
                f"TOKENIZER_MODEL={path}: must be a JSON list that ends with {END_OF_TEXT!r}"
            )
        alphabet = pieces[:-1]
        characters = all(isinstance(piece, str) and len(piece) == 1 for piece in alphabet)
        if not alphabet or not characters or len(set(alphabet)) != len(alphabet):
            raise ConfigError(
                f"TOKENIZER_MODEL={path}: what comes before {END_OF_TEXT!r} must be different "
                "single characters"
            )
        return cls(alphabet)

    @staticmethod
    def write_alphabet(characters: Iterable[str], path: str) -> None:
        """Write the sorted set of `characters` as an alphabet file."""
        text = json.dumps([*sorted(set(characters)), END_OF_TEXT], ensure_ascii=True) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Characters and the end of document."""
        return len(self.alphabet) + 1

    @property
    def eod(self) -> int:
        """The id after the last character."""
        return len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            DataError: a character is not in the alphabet.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"character {character!r} (U+{ord(character):04X}) is not among the "
                f"{len(self.alphabet)} of the alphabet; make the alphabet from all of the text, "
                "or use ByteTokenizer"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the end of document shows as nothing."""
        return "".join(self.alphabet[i] for i in ids if i < len(self.alphabet))

    def fingerprint(self) -> str:
        """Hash of the alphabet."""
        return hashlib.sha256(json.dumps(["characters", *self.alphabet]).encode()).hexdigest()


class NullTokenizer(_TextByText):
    """Numbers separated by spaces are the ids; the last id of the vocabulary ends a document."""

    def __init__(self, vocab_size: int) -> None:
        """Tokenizer of `vocab_size` ids, the end of document included."""
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text.

        Raises:
            DataError: a word is not a number of the vocabulary.
        """
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer reads numbers separated by spaces ({error})") from error
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"id {i} is outside the vocabulary [0, {self.vocab_size}); raise VOCAB_SIZE"
                )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as numbers."""
        return " ".join(str(i) for i in ids)

    def fingerprint(self) -> str:
        """Hash of the vocabulary size."""
        return hashlib.sha256(f"null {self.vocab_size}".encode()).hexdigest()

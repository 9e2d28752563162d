"""Tokens of text by looking up its words: the same ids as the tokenizer's, many times as fast.

A text is split where a tokenizer is known to give both sides the ids that it gives the whole
(`borders`), and the ids of each piece are kept. Splits are made before a space that follows
printable ASCII; ASCII text is split into words as the pre-tokenizer does, where its rule is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron.data.prepare.tokenizer import (
    GPT2BPETokenizer,
    HFTokenizer,
    LoadedTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

KEPT_WORDS = 1 << 20  # some hundred MB at most; then the cache is cleared
_KEPT_LENGTH = 64  # characters; longer pieces hardly repeat
_BEGINNING = 4  # characters of an added token that are searched for
_SPACE = "\u2581"  # how vocabularies write a space

# Rules by which pre-tokenizers split text into words. None matches across printable ASCII and a
# space after it, and none looks back.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_RULES = {_GPT2, _LLAMA3, _QWEN2}
# Digits first, each or each run alone: the text on either side is split on its own.
_DIGITS = {
    individual: (r"\p{N}|" if individual else r"\p{N}+|")
    + _GPT2.replace(r"| ?\p{N}+", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")
    for individual in (True, False)
}
_PROBES = (
    "a b", "one  two", "x.  y", " lead", "1 2 3", "(a) [b] {c} d", "it's a don't", "a\tb c\n d",
    "end. Next", "sp   aces", "\u00e9t\u00e9 deux", "q \u4f60 r", "tail ", "! !", "A \n B",
)  # fmt: skip


class Borders(NamedTuple):
    """Where text may be split: before a space after printable ASCII; ASCII text into words."""

    words: re.Pattern[str] | None  # of ASCII text; None: it is split at spaces alone


class WordEncoder:
    """Encodes texts to the bytes of their ids, word by word where the tokenizer allows it."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
        """Encode with `tokenizer` into ids of `dtype`."""
        self.borders = borders(tokenizer)
        # A split after letters would hide a token such as <|end|> from the tokenizer.
        self._added: set[str] = set()
        if isinstance(tokenizer, HFTokenizer | LoadedTokenizer | GPT2BPETokenizer):
            added = json.loads(tokenizer.definition())["added_tokens"]
            self._added = {token["content"][:_BEGINNING] for token in added}
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._words: dict[str, bytes] = {}  # word after a space, which ends in printable ASCII
        self._pieces: dict[str, bytes] = {}  # any other piece, its space included

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of each text."""
        if self.borders is None:
            return [self._bytes(ids) for ids in self._tokenizer.encode_batch(texts)]
        if len(self._words) + len(self._pieces) > KEPT_WORDS:
            self._words.clear()
            self._pieces.clear()
        learned: dict[str, bytes] = {}  # of this call alone
        parts = [
            self._by_words(text, self.borders.words, learned)
            if self.borders.words is not None and self._is_plain(text)
            else self._by_spaces(text, learned)
            for text in texts
        ]
        missing = list(learned)
        for piece, ids in zip(missing, self._tokenizer.encode_batch(missing), strict=True):
            learned[piece] = self._bytes(ids)
            if len(piece) <= _KEPT_LENGTH:
                self._keep(piece, learned[piece])
        return [
            b"".join([part if isinstance(part, bytes) else learned[part] for part in found])
            for found in parts
        ]

    def _is_plain(self, text: str) -> bool:
        """ASCII, and no added token in it: a split into words would hide such as <|end|>."""
        return text.isascii() and not any(beginning in text for beginning in self._added)

    def _keep(self, piece: str, ids: bytes) -> None:
        self._pieces[piece] = ids
        word = piece[1:]
        if piece[0] == " " and " " not in word and _ends_a_piece(word):
            self._words[word] = ids

    def _by_words(
        self, text: str, rule: re.Pattern[str], learned: dict[str, bytes]
    ) -> list[bytes | str]:
        """Ids of the words of plain text; unknown words as text, added to `learned`."""
        pieces = rule.findall(text)
        result: list[bytes | str] = list(map(self._pieces.get, pieces))  # type: ignore[arg-type]
        place = -1
        try:
            while True:
                place = result.index(None, place + 1)  # type: ignore[arg-type]
                result[place] = pieces[place]
                learned[pieces[place]] = b""
        except ValueError:
            return result

    def _by_spaces(self, text: str, learned: dict[str, bytes]) -> list[bytes | str]:
        """As `_by_words`, for any text, split before spaces alone."""
        words = text.split(" ")
        known: list[bytes | None] = list(map(self._words.get, words))
        result: list[bytes | str] = []
        place, end = 0, len(words)
        known[0] = None  # no space before it
        while place < end:
            if known[place] is not None:
                try:
                    stop = known.index(None, place)  # a run of known words, at C's speed
                except ValueError:
                    stop = end
                result += known[place:stop]  # type: ignore[arg-type]
                place = stop
                continue
            last = place
            while last < end - 1 and not _ends_a_piece(words[last]):
                last += 1
            piece = " ".join(words[place : last + 1])
            if place:
                piece = f" {piece}"
            place = last + 1
            if piece:
                kept = self._pieces.get(piece)
                if kept is None:
                    learned[piece] = b""
                result.append(piece if kept is None else kept)
        return result

    def _bytes(self, ids: Sequence[int]) -> bytes:
        return np.asarray(ids, dtype=self._dtype).tobytes()


def _ends_a_piece(word: str) -> bool:
    """Whether the text may be split after this word, before the space that follows it."""
    return word != "" and "!" <= word[-1] <= "~"


def borders(tokenizer: Tokenizer) -> Borders | None:
    """Where text may be split without changing an id; None if in doubt."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = tokenizer.pieces()
        found = None if _SPACE not in pieces or any(map(_crosses, pieces)) else Borders(None)
    elif isinstance(tokenizer, HFTokenizer | LoadedTokenizer | GPT2BPETokenizer):
        found = _borders(json.loads(tokenizer.definition()))
    else:
        return None
    return found if all(_probe(tokenizer, text) for text in _PROBES) else None


def _probe(tokenizer: Tokenizer, text: str) -> bool:
    pieces, start = [], 0
    for place in range(1, len(text)):
        if text[place] == " " and "!" <= text[place - 1] <= "~":
            pieces.append(text[start:place])
            start = place
    pieces.append(text[start:])
    return [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def _crosses(token: str) -> bool:
    """Whether a token goes from a word into the space after it."""
    return _SPACE in token.lstrip(_SPACE)


def _borders(definition: dict[str, Any]) -> Borders | None:
    """As `borders`, of a `tokenizers` definition."""
    model, normalizer = definition["model"], definition["normalizer"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    for token in definition["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return None
        if any(character.isspace() for character in token["content"]):
            return None
    if normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        # No word borders at all, as in Gemma: merges stay inside existing tokens.
        inside = _SPACE in model["vocab"] and not any(map(_crosses, model["vocab"]))
        return Borders(None) if inside else None
    if normalizer not in (None, {"type": "NFC"}):
        return None
    steps = definition["pre_tokenizer"]
    rule = _rule(steps["pretokenizers"] if steps and steps["type"] == "Sequence" else [steps])
    return None if rule is None else Borders(_for_ascii(rule))


def _rule(steps: list[dict[str, Any] | None]) -> str | None:
    """The rule of pre-tokenizers that end with a map of bytes; None where it is not known."""
    last = steps[-1] if steps else None
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2 if last["use_regex"] else None
    first = steps[0]
    if len(steps) > 2 or first is None:
        return None
    if first["type"] == "Digits" and last["use_regex"]:
        return _DIGITS[bool(first["individual_digits"])]
    if first["type"] == "Split" and not last["use_regex"] and first["behavior"] == "Isolated":
        rule = first["pattern"].get("Regex")
        return rule if rule in _RULES and not first["invert"] else None
    return None


def _for_ascii(rule: str) -> re.Pattern[str]:
    """The rule as it reads on ASCII text: Python's `\\s` has more characters than Unicode's."""
    white = r" \t\n\r\x0b\x0c"
    rule = rule.replace(r"[^\s", f"[^{white}").replace(r"\s", f"[{white}]")
    rule = rule.replace(r"\S", f"[^{white}]")
    for name, letters in ((r"\p{L}", "A-Za-z"), (r"\p{N}", "0-9")):
        rule = re.sub(rf"(\[[^\]]*){re.escape(name)}", rf"\g<1>{letters}", rule)
        rule = rule.replace(name, f"[{letters}]")
    return re.compile(rule)

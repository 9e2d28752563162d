"""Data-file lists as users write them: which files are read, and how much of each.

    0.7 data/code code                # weight prefix corpus; `#` starts a comment
    0.3 data/books books
    corpus books max_epochs=4         # no sample of it is seen more often

A list of stages has the lines `stage 0 a.txt`, `stage 2T b.txt`: the token of the run from which
each list is used. Its path is relative to the folder of the list of stages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron.config.errors import DataError

BUILTIN = "builtin"  # DATA_FILE_LIST of the corpus that needs no files
DEFAULT_CORPUS = "default"
TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class DataSource(NamedTuple):
    """One line of a list.

    Attributes:
        weight: share in the mix, 0 or above; a line of weight 0 is checked but never read.
        max_epochs: limit of its corpus; None for no limit.
    """

    weight: float
    prefix: str
    corpus: str
    line: int
    max_epochs: float | None = None


class ListStage(NamedTuple):
    """A list and the token of the run from which it is used."""

    start_tokens: int
    path: str
    sources: tuple[DataSource, ...]


def parse_data_list(path: str | Path, name: str = "DATA_FILE_LIST") -> tuple[DataSource, ...]:
    """The data lines of a list; `.bin` and what follows it is removed from a prefix.

    Args:
        path: the file.
        name: the variable or flag that named it, for messages.

    Raises:
        DataError: with file, line number and fix, for a missing or empty list or a bad line.
    """
    lines = _lines(path, name)
    sources: list[DataSource] = []
    for number, words in lines:
        if words[0] not in ("corpus", "stage"):
            try:
                sources.append(_source(words, f"{name}: {path}:{number}", number))
            except DataError as error:
                hint = "" if sources else _text_hint(path, name)  # no line before it was right
                raise DataError(f"{error}{hint}") from None
    for number, words in lines:
        if words[0] == "stage":
            raise DataError(
                f"{name}: {path}:{number}: `stage` lines and data lines do not mix; put "
                "the data lines into a list of their own"
            )
    if not sources:
        raise DataError(
            f"{name}={path} has no data line; write `weight prefix corpus`, "
            "e.g. `1.0 data/books books`"
        )
    if not any(source.weight for source in sources):
        raise DataError(f"{name}={path}: every line has weight 0; give one a weight above 0")
    limits: dict[str, float] = {}
    corpora = {source.corpus for source in sources}
    for number, words in lines:
        if words[0] == "corpus":
            corpus, limit = _limit(words, f"{name}: {path}:{number}", corpora)
            if corpus in limits:
                raise DataError(
                    f"{name}: {path}:{number}: corpus {corpus} has two limits; keep one"
                )
            limits[corpus] = limit
    return tuple(source._replace(max_epochs=limits.get(source.corpus)) for source in sources)


def parse_data_stages(path: str | Path, name: str = "DATA_FILE_LIST") -> tuple[ListStage, ...]:
    """The stages of a list of stages; a list of data lines is one stage, from token 0 on.

    Args:
        path: the file.
        name: the variable or flag that named it, for messages.

    Raises:
        DataError: as `parse_data_list`, and for stages that are not in order.
    """
    lines = _lines(path, name)
    if not any(words[0] == "stage" for _, words in lines):
        return (ListStage(0, str(path), parse_data_list(path, name)),)
    stages: list[ListStage] = []
    for number, words in lines:
        where = f"{name}: {path}:{number}"
        if words[0] != "stage" or len(words) != 3:
            raise DataError(
                f"{where}: {' '.join(words)[:80]!r} is not `stage TOKENS LIST`, "
                "e.g. `stage 2T b.txt`; a list of stages has no other lines"
            )
        start = _tokens(words[1], where)
        if not stages and start != 0:
            raise DataError(f"{where}: the first stage must start at 0, not at {words[1]}")
        if stages and start <= stages[-1].start_tokens:
            raise DataError(
                f"{where}: starts at {start} tokens, but the stage before it starts at "
                f"{stages[-1].start_tokens}; put the stages in order"
            )
        file = Path(path).parent / words[2]
        stages.append(ListStage(start, str(file), parse_data_list(file, where)))
    return tuple(stages)


def require_plain(stages: Sequence[ListStage]) -> None:
    """Refuse what DATA_ORDER=megatron does not have; raises DataError."""
    limited = sorted({s.corpus for s in stages[0].sources if s.max_epochs is not None})
    if len(stages) > 1 or limited:
        what = f"max_epochs of {', '.join(limited)}" if limited else f"{len(stages)} stages"
        raise DataError(
            f"{stages[0].path}: {what}: DATA_ORDER=megatron has neither stages nor limits; remove "
            "them, or set DATA_ORDER=stateless"
        )


def _lines(path: str | Path, name: str) -> list[tuple[int, list[str]]]:
    """Number and words of each line that is not empty."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        instead = f", or {name}={BUILTIN}" if name == "DATA_FILE_LIST" else ""
        raise DataError(
            f"{name}={path} does not exist (working folder {Path.cwd()}); "
            f"give a file of `weight prefix corpus` lines{instead}{_import_hint(str(path))}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        hint = _text_hint(path, name)
        raise DataError(f"{name}={path} cannot be read: {error}{hint}") from None
    return [
        (number, words) for number, line in enumerate(lines, start=1) if (words := _words(line))
    ]


def _text_hint(path: str | Path, name: str) -> str:
    """What to do with text that was given as a list."""
    if name != "DATA_FILE_LIST":
        return ""
    return f". If {path} is text to train on, not a list of token files: DATA={path}"


def _import_hint(path: str) -> str:
    """Where the lists of the machines come from."""
    if "data-lists/" not in path:
        return ""
    empty = " (is $(...) empty?)" if "data-lists//" in path else ""
    return (
        f"{empty}. `python3 tools/import_data_lists.py CHECKOUT` copies those of a checkout of "
        "argonne-lcf/Megatron-DeepSpeed"
    )


def _limit(words: list[str], where: str, corpora: set[str]) -> tuple[str, float]:
    """Corpus and limit of a `corpus` line."""
    found = re.fullmatch(r"max_epochs=(\S+)", words[2]) if len(words) == 3 else None
    try:
        limit = float(found.group(1)) if found else 0.0
    except ValueError:
        limit = 0.0
    if not (math.isfinite(limit) and limit > 0):
        raise DataError(
            f"{where}: {' '.join(words)[:80]!r} is not `corpus NAME max_epochs=NUMBER` with a "
            "number above 0"
        )
    if words[1] not in corpora:
        raise DataError(
            f"{where}: no line has the corpus {words[1]}; there are: {', '.join(sorted(corpora))}"
        )
    return words[1], limit


def _tokens(text: str, where: str) -> int:
    """Tokens of `0`, `500B`, `2T`, `1.5T`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text)
    if not found:
        raise DataError(
            f"{where}: {text!r} is no number of tokens; write digits and K, M, B or T, e.g. 2T"
        )
    return round(float(found.group(1)) * TOKEN_UNITS[found.group(2)])


def _words(line: str) -> list[str]:
    """Words of a line before a word that starts with `#`."""
    words = line.split()
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def _source(words: list[str], where: str, number: int) -> DataSource:
    """One line; `where` is the file and line for messages."""
    if len(words) not in (2, 3):
        raise DataError(
            f"{where}: {len(words)} words ({' '.join(words)[:80]}); write `weight prefix corpus`, "
            "the corpus is optional and paths hold no spaces"
        )
    try:
        weight = float(words[0])
    except ValueError:
        raise DataError(
            f"{where}: weight {words[0]!r} is not a number; write `weight prefix corpus`"
        ) from None
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(f"{where}: weight {words[0]} must be 0 (never read) or above")
    prefix = words[1].partition(".bin")[0]
    return DataSource(weight, prefix, words[2] if len(words) == 3 else DEFAULT_CORPUS, number)

"""Steps that are not trained on (`TRAIN_RANGE_TO_SKIP`): parsed, merged, and looked up.

Ranges are pairs (first, last), inclusive, of the 1-based step numbers that the log prints.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path

from megatron.config.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]


def parse_ranges(text: str, name: str = "TRAIN_RANGE_TO_SKIP") -> Ranges:
    """Sorted, disjoint ranges from `10 20 25 30`, `10-20,25-30`, a mixture, or `@file` of the same.

    Args:
        text: what the user wrote; in a file `#` starts a comment.
        name: the variable or flag that set it, for messages.

    Raises:
        ConfigError: for an odd count, a > b, a step below 1, or what is not a number.
    """
    if text.startswith("@"):
        text = _read(Path(text[1:]), name)
    single: list[int] = []
    pairs: list[tuple[int, int]] = []
    for word in text.replace(",", " ").split():
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"{name}: {word!r} is neither a step nor first-last; write `10 20 25 30` or "
                "`10-20,25-30`"
            )
        if dash:
            pairs.append((int(first), int(last)))
        else:
            single.append(int(first))
    if len(single) % 2:
        raise ConfigError(
            f"{name}: {len(single)} step numbers ({' '.join(map(str, single))}) do not make pairs: "
            f"{len(single)} / 2 leaves 1; give first and last of each range, e.g. {single[-1]} "
            f"{single[-1]}"
        )
    pairs += zip(single[::2], single[1::2], strict=True)
    for first_step, last_step in pairs:
        if first_step < 1:
            raise ConfigError(f"{name}: steps count from 1, but a range starts at {first_step}")
        if first_step > last_step:
            raise ConfigError(
                f"{name}: {first_step} > {last_step}: a range is first, last; write {last_step} "
                f"{first_step}"
            )
    return merge(pairs)


def merge(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The same steps as sorted ranges that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


def is_skipped(step: int, ranges: Ranges) -> bool:
    """Whether 1-based step `step` lies in one of the merged ranges."""
    position = bisect.bisect_right(ranges, step, key=lambda pair: pair[0])
    return position > 0 and step <= ranges[position - 1][1]


def skipped_before(step: int, ranges: Ranges) -> int:
    """How many of the steps 1 .. step - 1 are skipped."""
    return sum(max(0, min(last, step - 1) - first + 1) for first, last in ranges)


def ranges_text(ranges: Ranges) -> str:
    """The ranges in the spelling that `parse_ranges` reads back: `10-20,25-30`."""
    return ",".join(f"{first}-{last}" for first, last in ranges)


def _read(path: Path, name: str) -> str:
    """Words of a file of ranges, comments removed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name}=@{path}: cannot be read ({error}); give an existing text file"
        ) from None
    return " ".join(line.partition("#")[0] for line in lines)

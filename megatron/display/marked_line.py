"""A line of a log with the record that it was made from before it, from a rank to its launcher.

The launcher writes the line into output.log and draws the record: nothing is parsed back from text.
Ranks mark lines only where the launcher asks for it, with the variable LIVE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LIVE = "MEGATRON_LIVE"
"""Variable of the ranks: set where the launcher takes marked lines."""

MARK = "\x1e"  # ASCII's record separator: no line of text begins with it


def marked(line: str, record: Mapping[str, Any]) -> str:
    """The line with a record, as JSON, in front of it; NaN may be in it."""
    return f"{MARK}{json.dumps(record)}{MARK}{line}"


def unmarked(line: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """The record of a line, None where there is none, and the line without it."""
    if not line.startswith(MARK.encode()):
        return None, line
    text, found, rest = line[1:].partition(MARK.encode())
    try:
        record = json.loads(text)
    except ValueError:
        return None, line
    return (record, rest) if found and isinstance(record, dict) else (None, line)

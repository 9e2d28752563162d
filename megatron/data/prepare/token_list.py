"""A data list of pairs that were just made, weights by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError
from megatron.data.indexed_header import read_header


def write_list(path: Path, pairs: Sequence[tuple[str, str]], remark: str) -> int:
    """Write a list of (corpus, prefix) pairs; returns their tokens.

    A file's weight is its share of the tokens, so that all of them are seen equally often.

    Raises:
        ConfigError: a prefix cannot stand in a list.
    """
    tokens = {prefix: read_header(prefix).tokens for _, prefix in pairs}
    for prefix in tokens:
        if len(prefix.split()) != 1 or ".bin" in prefix:
            raise ConfigError(
                f"{prefix!r} cannot stand in a data list, whose paths have no spaces and no .bin"
            )
    total = max(sum(tokens.values()), 1)
    lines = [f"# {remark}", "# weight prefix corpus"]
    lines += [f"{tokens[prefix] / total:.10g} {prefix} {corpus}" for corpus, prefix in pairs]
    write_atomically(path, "\n".join(lines) + "\n")
    return sum(tokens.values())

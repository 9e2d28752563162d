#!/usr/bin/env python3
"""Copies the data lists of a checkout of argonne-lcf/Megatron-DeepSpeed to ALCF/data-lists.

    python3 tools/import_data_lists.py ~/Megatron-DeepSpeed
    python3 tools/import_data_lists.py ~/Megatron-DeepSpeed --machine aurora --machine polaris

Each list is read first; what a run would refuse is not copied. A list that was changed here stays
unless --force is given. Exit status: 0, 2 for a wrong setting, 3 if a list cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.data.data_list import DataSource, parse_data_list

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path("ALCF/data-lists")
TOKENIZERS = {
    "llama": "Llama-2's ids (TOKENIZER_TYPE=Llama2Tokenizer TOKENIZER_MODEL=<its tokenizer.model>)",
    "gemma": "gemma's ids (TOKENIZER_TYPE=HFTokenizer TOKENIZER_MODEL=google/gemma-7b)",
}
"""A word in the path of a file -> whose ids it holds, and how to name that tokenizer."""


class Found(NamedTuple):
    """A list of the checkout: where it goes, its text, and its lines."""

    target: Path
    content: bytes
    sources: tuple[DataSource, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Copies the lists; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        found, problems = read_lists(options.checkout, options.machine, options.out)
        changed = [
            one.target
            for one in found
            if one.target.exists() and one.target.read_bytes() != one.content
        ]
        if changed and not options.force:
            raise ConfigError(
                f"{len(changed)} list(s) here differ from the checkout's, e.g. {changed[0]}; "
                "nothing was copied: --force replaces them, --machine leaves machines out"
            )
        for one in found:
            print(_line(one, "changed" if one.target in changed else ""))
            one.target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(one.target, one.content, durable=False)
    except (ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return ConfigError.exit_status if isinstance(error, OSError) else error.exit_status
    for problem in problems:
        print(f"NOT COPIED: {problem}", file=sys.stderr)
    machines = {one.target.parent.name for one in found}
    print(f"{len(found)} lists of {len(machines)} machines in {options.out}")
    for word, whose in TOKENIZERS.items():
        lists = [one for one in found if word in _tokenizers(one.sources)]
        if lists:
            print(f"{len(lists)} list(s), by the names of their files, hold {whose}")
    return DataError.exit_status if problems else 0


def read_lists(
    checkout: Path, machines: Sequence[str] | None, out: Path
) -> tuple[list[Found], list[str]]:
    """The lists of a checkout, and what is wrong with those that cannot be read.

    Args:
        checkout: the repository's folder.
        machines: only these; none: all that it has.
        out: folder of the lists here.

    Raises:
        ConfigError: the checkout or a machine has no lists.
    """
    folder = checkout / LISTS
    known = sorted(path.name for path in folder.glob("*") if any(path.glob("*.txt")))
    if not known:
        raise ConfigError(
            f"{folder} holds no <machine>/<name>.txt; give the folder of a checkout of "
            "argonne-lcf/Megatron-DeepSpeed"
        )
    missing = sorted(set(machines or ()) - set(known))
    if missing:
        raise ConfigError(f"--machine {missing[0]}: {folder} has {', '.join(known)}")
    found, problems = [], []
    for machine in machines or known:
        for path in sorted((folder / machine).glob("*.txt")):
            try:
                sources = parse_data_list(path, "list")
                found.append(Found(out / machine / path.name, path.read_bytes(), sources))
            except DataError as error:
                problems.append(str(error))
    return found, problems


def _line(one: Found, note: str) -> str:
    """What a list holds."""
    sources = one.sources
    corpora = {source.corpus for source in sources}
    files = len({source.prefix for source in sources})
    text = (
        f"{one.target.parent.name}/{one.target.name}: {len(sources):,} lines, {files:,} files, "
        f"{len(corpora)} corpora, weights add up to {sum(s.weight for s in sources):.6g}"
    )
    return ", ".join([text, *sorted(_tokenizers(sources)), *([note] if note else [])])


def _tokenizers(sources: Sequence[DataSource]) -> set[str]:
    """Words of TOKENIZERS in the paths of the files."""
    return {word for word in TOKENIZERS if any(word in s.prefix.lower() for s in sources)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkout", type=Path, help="folder of a checkout of argonne-lcf/Megatron-DeepSpeed")
    add("--machine", action="append", help="only this machine's lists; may be repeated")
    add("--out", type=Path, default=ROOT / LISTS, help="folder to copy to; default ALCF/data-lists")
    add("--force", action="store_true", help="replace lists that differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())

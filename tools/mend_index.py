#!/usr/bin/env python3
"""Mends indexes that do not count the end-of-document token, as Megatron-DeepSpeed's
`preprocess_data.py --append-eod` writes them. The tokens (.bin) are never written to.

    python3 tools/mend_index.py data/books_text_document --check      what is wrong
    python3 tools/mend_index.py ALCF/data-lists/aurora/books.txt      all files of a list
    python3 tools/mend_index.py LIST --out DIR                        a folder you may not write to
    python3 tools/mend_index.py LIST --as-reference                   to continue a run of the old

A mended index is written beside the old one, read back, and takes its place; the old one stays as
.idx.uncounted-eod. Stopped half way, the same command goes on. With --as-reference the old index
stays in use: documents begin early, as they did, and the tokens at the end that the reference never
read are left out. Exit status: 0, 2 for a wrong setting, 3 if a pair is wrong in another way;
with --check 1 if one is to be mended.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.data.data_list import parse_data_list
from megatron.data.prepare.uncounted_eod import (
    Uncounted,
    accept_as_reference,
    examine,
    kept_index,
    mend,
)
from megatron.display.progress import progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Mends all pairs; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    status, counts = 0, {"right": 0, "mended": 0, "bad": 0}
    try:
        prefixes = find_prefixes(options.inputs)
        targets = _targets(prefixes, options.out)
        moved: dict[str, str] = {}
        for prefix in _watched(prefixes):
            try:
                found = examine(prefix, options.eod, kept=options.as_reference)
                if found is None:
                    kept = kept_index(prefix).exists()
                    print(f"{prefix}: every token is counted{' (mended before)' * kept}")
                    counts["right"] += 1
                    continue
                print(describe(found, options.as_reference))
                if not options.check:
                    change = accept_as_reference if options.as_reference else mend
                    change(found, targets[prefix])
                    moved[prefix] = targets[prefix]
                counts["mended"] += 1
            except DataError as error:
                print(f"BAD: {error}", file=sys.stderr)
                counts["bad"] += 1
                status = error.exit_status
        if options.out and moved:
            for name in options.inputs:
                _rewrite(name, options.out, moved)
    except (ConfigError, DataError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return ConfigError.exit_status if isinstance(error, OSError) else error.exit_status
    done = "read as before" if options.as_reference else "mended"
    if options.check:
        done = f"to be {done}"
        status = status or int(counts["mended"] > 0)
    print(f"{counts['right']} right, {counts['mended']} {done}, {counts['bad']} bad")
    return status


def _watched(prefixes: Sequence[str]) -> Iterator[str]:
    """The prefixes one by one, with a bar."""
    with progress("examining", len(prefixes), "files") as bar:
        for prefix in prefixes:
            yield prefix
            bar.advance()


def describe(found: Uncounted, as_reference: bool) -> str:
    """Which documents, and how many tokens."""
    documents = f"{found.documents:,} documents (0 to {found.documents + found.empty - 1:,}"
    documents += f", {found.empty:,} of them empty)" if found.empty else ")"
    if as_reference:
        what = (
            f"{found.documents:,} tokens at the end left out, document k begins k tokens early"
            f"{' (empty ones not counted)' * (found.empty > 0)}"
        )
    else:
        what = f"{found.documents:,} gained"
    return (
        f"{found.prefix}: {documents}, each without its last token, id {found.eod}: "
        f"{found.header.tokens:,} tokens counted, {found.tokens:,} true, {what}"
    )


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Prefixes named by themselves, by one of their files, or by a list."""
    prefixes: list[str] = []
    for text in inputs:
        bare = text[:-4] if text.endswith((".bin", ".idx")) else text
        if Path(f"{bare}.idx").exists() or not Path(text).is_file():
            prefixes.append(bare)
        else:
            prefixes += [source.prefix for source in parse_data_list(text, "LIST")]
    return list(dict.fromkeys(prefixes))


def _targets(prefixes: Sequence[str], out: Path | None) -> dict[str, str]:
    """Prefix -> where its index goes; below `out` as below their common folder."""
    if out is None:
        return {prefix: prefix for prefix in prefixes}
    real = {prefix: os.path.abspath(prefix) for prefix in prefixes}
    common = os.path.commonpath([os.path.dirname(path) for path in real.values()])
    if Path(common) == out.resolve():
        raise ConfigError(f"--out {out} is the folder of the data; give another one")
    return {prefix: str(out / os.path.relpath(path, common)) for prefix, path in real.items()}


def _rewrite(name: str, out: Path, moved: dict[str, str]) -> None:
    """A list's copy in `out` that names the pairs there; nothing for a prefix."""
    path = Path(name)
    if not path.is_file() or name.endswith((".bin", ".idx")):
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        prefix = words[1].partition(".bin")[0] if len(words) > 1 else ""
        lines.append(line.replace(words[1], moved[prefix], 1) if prefix in moved else line)
    write_atomically(out / path.name, "\n".join(lines) + "\n")
    print(f"{out / path.name}: the list with the pairs in {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="PREFIX|LIST", help="pairs, or lists of pairs")
    add("--check", action="store_true", help="say what is wrong and change nothing")
    add("--out", type=Path, help="folder for the indexes, with links to the tokens, and the lists")
    add("--eod", type=int, help="the id that ends documents; default: whichever is found")
    add("--as-reference", action="store_true", help="read them as Megatron-DeepSpeed did")
    return parser


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Checks the files of a data list before a run: one row per corpus, and every bad file.

    python3 tools/check_data.py LIST [--deep] [--tokenizer-type T --tokenizer-model M]

Reads the whole index and some places of each file, with --deep every token. Exit status: 0 all is
well, 2 a setting is wrong, 3 some file is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.data.data_list import DataSource, parse_data_stages
from megatron.data.prepare.audit import Audit, audit_file, duplicates
from megatron.data.prepare.tokenizer import TOKENIZERS, Tokenizer, build_tokenizer
from megatron.data.tokenizer_note import note_path, other_tokenizers
from megatron.display.progress import progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all files; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers}: must be 1 or more")
        stages = parse_data_stages(options.list, "LIST")
        tokenizer = None
        if options.tokenizer_type:
            tokenizer = build_tokenizer(
                options.tokenizer_type, options.tokenizer_model, options.vocab_size
            )
        sources = [source for stage in stages for source in stage.sources]
        return check(sources, options.vocab_size, tokenizer, options)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status


def check(
    sources: Sequence[DataSource],
    vocab_size: int | None,
    tokenizer: Tokenizer | None,
    options: argparse.Namespace,
) -> int:
    """Checks each file once and prints the results."""
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    prefixes = list(dict.fromkeys(source.prefix for source in sources))
    # Threads: reading, hashing and numpy leave the interpreter free.
    audits: dict[str, Audit] = {}
    with (
        ThreadPoolExecutor(options.workers) as pool,
        progress("checking", len(prefixes), "files") as bar,
    ):
        work = pool.map(lambda p: audit_file(p, vocab_size, tokenizer, options.deep), prefixes)
        for audit in work:
            audits[audit.prefix] = audit
            bar.advance()
    problems = [(audit.prefix, line) for audit in audits.values() for line in audit.problems]
    problems += duplicates(audits.values(), options.deep)
    if tokenizer is None:  # else each file was compared with it
        problems += other_tokenizers(prefixes)
    if options.json:
        print(json.dumps(_as_json(audits.values(), problems), indent=1))
    else:
        print(_table(sources, audits, {prefix for prefix, _ in problems}))
        opened = [audit.prefix for audit in audits.values() if audit.dtype != "-"]
        without = [prefix for prefix in opened if not note_path(prefix).exists()]
        if without:
            print(f"{len(without)} file(s) do not name their tokenizer, e.g. {without[0]}")
        if vocab_size is None and without:
            print(
                "their ids are compared with no vocabulary: give --tokenizer-type or --vocab-size"
            )
        left_out = [audit for audit in audits.values() if audit.left_out]
        if left_out:
            print(
                f"{len(left_out)} file(s) are read as Megatron-DeepSpeed read them: documents "
                f"begin early, {sum(audit.left_out for audit in left_out):,} tokens at the ends "
                f"are left out, e.g. {left_out[0].prefix}"
            )
        for _, line in problems:
            print(f"BAD: {line}")
        print(f"{len(prefixes)} files, {len({prefix for prefix, _ in problems})} bad")
    return DataError.exit_status if problems else 0


def _table(sources: Iterable[DataSource], audits: dict[str, Audit], bad: set[str]) -> str:
    corpora: dict[str, list[Audit]] = {}
    for corpus, prefix in dict.fromkeys((source.corpus, source.prefix) for source in sources):
        corpora.setdefault(corpus, []).append(audits[prefix])
    rows = [("corpus", "files", "documents", "tokens", "dtype", "max id", "EOD share", "bad")]
    for corpus, files in sorted(corpora.items()):
        shares = [(f.eod_share, f.tokens) for f in files if f.eod_share is not None]
        weight = sum(tokens for _, tokens in shares)
        share = sum(part * tokens for part, tokens in shares) / weight if weight else None
        rows.append(
            (
                corpus,
                f"{len(files):,}",
                f"{sum(f.documents for f in files):,}",
                f"{sum(f.tokens for f in files):,}",
                "/".join(sorted({f.dtype for f in files})),
                f"{max(f.max_id for f in files):,}",
                "-" if share is None else f"{share:.4%}",
                str(sum(f.prefix in bad for f in files)),
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _as_json(audits: Iterable[Audit], problems: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "files": [
            {
                "prefix": audit.prefix,
                "tokens": audit.tokens,
                "documents": audit.documents,
                "dtype": audit.dtype,
                "max_id": audit.max_id,
                "eod_share": audit.eod_share,
                "digest": audit.digest,
            }
            for audit in audits
        ],
        "problems": [{"prefix": prefix, "problem": line} for prefix, line in problems],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("list", help="a data file list, or a list of stages")
    add("--deep", action="store_true", help="read every token, and hash them")
    add("--vocab-size", type=int, help="ids must lie below it; default: the tokenizer's")
    add("--tokenizer-type", choices=sorted(TOKENIZERS), help="that should have made the files")
    add("--tokenizer-model", help="its name or path")
    add("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="files read at a time")
    add("--json", action="store_true", help="what was found of each file, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

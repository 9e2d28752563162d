#!/usr/bin/env python3
"""Joins `.bin/.idx` pairs of one dtype and tokenizer into one pair.

    python3 tools/merge_datasets.py --input data/a data/b --output-prefix data/all
    python3 tools/merge_datasets.py --input FOLDER --output-prefix data/all

A folder stands for all its pairs, sorted by name. Exit status: 0, 2 for a wrong setting, 3 for
wrong data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.data.prepare.merge import merge_pairs
from megatron.display.progress import BYTES, progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, .bin files or folders")
    parser.add_argument("--output-prefix", required=True, help="writes <prefix>.bin and .idx")
    options = parser.parse_args(arguments)
    try:
        prefixes = find_prefixes(options.input)
        output = str(Path(options.output_prefix).resolve())
        if output in {str(Path(prefix).resolve()) for prefix in prefixes}:
            raise ConfigError(f"--output-prefix {options.output_prefix} is one of the inputs")
        size = sum(path.stat().st_size for path in _token_files(prefixes))
        with progress("merging", size, BYTES) as bar:
            documents, tokens = merge_pairs(prefixes, options.output_prefix, bar.advance)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    print(
        f"{len(prefixes)} pairs, {documents:,} documents, {tokens:,} tokens: "
        f"{options.output_prefix}.bin"
    )
    return 0


def _token_files(prefixes: Sequence[str]) -> list[Path]:
    """Those that are there: `merge_pairs` says which are not."""
    paths = (Path(f"{prefix}.bin") for prefix in prefixes)
    return [path for path in paths if path.exists()]


def find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Prefixes of pairs named by prefix, by `.bin` or `.idx` file, or by folder.

    Raises:
        ConfigError: a folder has no pair.
    """
    prefixes: list[str] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(str(index)[: -len(".idx")] for index in path.glob("*.idx"))
            if not found:
                raise ConfigError(f"{text}: the folder has no .idx file")
            prefixes += found
        else:
            prefixes.append(text[:-4] if text.endswith((".bin", ".idx")) else text)
    return prefixes


if __name__ == "__main__":
    sys.exit(main())

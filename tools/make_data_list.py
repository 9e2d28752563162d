#!/usr/bin/env python3
"""Makes a data file list from pairs: one corpus per folder (or named), weights by tokens.

    python3 tools/make_data_list.py data/books data/code > list.txt            by tokens
    python3 tools/make_data_list.py data/books data/code --temperature 2       flatter
    python3 tools/make_data_list.py books=data/b code=data/c --shares books=0.3 code=0.7

Within a corpus a file's weight is in proportion to its tokens, so that all of it is seen equally
often. Exit status: 0, 2 for a wrong setting, 3 for wrong data.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed_header import read_header
from megatron.data.tokenizer_note import require_one_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the list; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        text = data_list(options.inputs, options.temperature, options.shares, options.max_epochs)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    if options.output is None:
        sys.stdout.write(text)
        return 0
    try:
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{parser.prog}: error: --output {options.output}: {error}", file=sys.stderr)
        return ConfigError.exit_status
    return 0


def data_list(
    inputs: Sequence[str],
    temperature: float = 1.0,
    shares: Sequence[str] | None = None,
    max_epochs: Sequence[str] | None = None,
) -> str:
    """The lines of a list.

    Args:
        inputs: folders, `.bin` files or prefixes, each with `CORPUS=` before it or not.
        temperature: a corpus' share is its tokens to the power 1 / temperature.
        shares: `CORPUS=SHARE`, instead.
        max_epochs: `CORPUS=NUMBER`.

    Raises:
        ConfigError: shares do not fit the corpora.
        DataError: a pair is damaged, or two were made with different tokenizers.
    """
    corpora: dict[str, dict[str, int]] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        corpus, path = (name, path) if equals else (_corpus(text), text)
        corpora.setdefault(corpus, {}).update(_tokens(path))
    require_one_tokenizer(prefix for files in corpora.values() for prefix in files)
    weights = {
        corpus: float(sum(files.values())) ** (1 / temperature) for corpus, files in corpora.items()
    }
    if shares is not None:
        weights = _numbers("--shares", shares, list(corpora))
        missing = sorted(corpora.keys() - weights.keys())
        if missing:
            raise ConfigError(f"--shares: none for {', '.join(missing)}")
    limits = _numbers("--max-epochs", max_epochs or (), list(corpora))
    total = sum(weights.values())
    lines = []
    for corpus, files in corpora.items():
        tokens = sum(files.values())
        share = weights[corpus] / total
        lines.append(f"# {corpus}: {len(files)} files, {tokens:,} tokens, share {share:.4f}")
        lines += [f"{share * n / tokens:.10g} {prefix} {corpus}" for prefix, n in files.items()]
        if corpus in limits:
            lines.append(f"corpus {corpus} max_epochs={limits[corpus]:g}")
    return "\n".join(lines) + "\n"


def _tokens(path: str) -> dict[str, int]:
    """Tokens of the pairs in a folder, or of one pair, by prefix."""
    if Path(path).is_dir():
        prefixes = sorted(str(index)[: -len(".idx")] for index in Path(path).glob("**/*.idx"))
        if not prefixes:
            raise ConfigError(
                f"{path}: the folder has no .idx file; of text, tools/preprocess_data.py "
                f"--per-folder makes pairs and a list, and DATA={path} trains on it"
            )
    else:
        prefixes = [path[:-4] if path.endswith((".bin", ".idx")) else path]
    for prefix in prefixes:
        if len(prefix.split()) != 1 or ".bin" in prefix:
            raise ConfigError(f"{prefix!r}: a prefix in a list has no spaces and no .bin")
    return {prefix: read_header(prefix).tokens for prefix in prefixes}


def _corpus(path: str) -> str:
    """The folder's name."""
    return (Path(path) if Path(path).is_dir() else Path(path).parent).resolve().name


def _numbers(flag: str, given: Sequence[str], corpora: Sequence[str]) -> dict[str, float]:
    """`CORPUS=NUMBER` as a table."""
    numbers = {}
    for text in given:
        corpus, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag} {text}: write CORPUS=NUMBER with a number above 0")
        if corpus not in corpora:
            raise ConfigError(f"{flag} {text}: the corpora are {', '.join(corpora)}")
        numbers[corpus] = value
    return numbers


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", help="folders, .bin files or prefixes; CORPUS=PATH names the corpus")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--temperature", type=_positive, default=1.0, help="1: by tokens")
    weights.add_argument("--shares", nargs="+", metavar="CORPUS=SHARE", help="of the samples")
    add("--max-epochs", nargs="+", metavar="CORPUS=NUMBER", help="limits to write into the list")
    add("--output", type=Path, help="file to write; default: standard output")
    return parser


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Turn JSON lines, tables and plain text into Megatron's `.bin/.idx` pairs, and a list of them.

Writes `<output-prefix>_<key>_document.{bin,idx,tokenizer.json}`, one pair per JSON key, and
`<output-prefix>.list`; with --per-file or --per-folder a pair and a corpus for each file or folder
of --input. A text file is one document. Memory stays constant, documents keep their order for any
number of workers, and an interrupted run resumes when the same command is given again.
Exit status: 0 done, 2 a setting is wrong, 3 the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.data.own_text import BUILTIN_TOKENIZER
from megatron.data.prepare import text_input
from megatron.data.prepare.encode import Recipe, tokenizer_of
from megatron.data.prepare.plain_tokenizers import CharTokenizer
from megatron.data.prepare.preprocess import preprocess
from megatron.data.prepare.token_list import write_list
from megatron.data.prepare.tokenizer import TOKENIZERS, builtin_model
from megatron.data.text_files import PLAIN, TextInput, find_text, is_plain

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, tokenise, write; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        corpora = _corpora(options)
        _require_keys(options, corpora)
        model = _tokenizer_model(options, [path for one in corpora for path in one.paths])
        recipe = Recipe(
            options.tokenizer_type,
            model,
            options.vocab_size,
            tuple(options.json_keys),
            options.append_eod,
        )
        _preprocess(corpora, recipe, options)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted: the same command resumes from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _preprocess(corpora: Sequence[TextInput], recipe: Recipe, options: argparse.Namespace) -> None:
    """Make each corpus' pairs, then the list; says what comes next."""
    tokenizer_of(recipe)  # its errors come before the first corpus
    several = options.per_file or options.per_folder
    made: list[tuple[str, str]] = []
    for corpus in corpora:
        pairs = preprocess(
            corpus.paths,
            f"{options.output_prefix}_{corpus.name}" if several else options.output_prefix,
            recipe,
            options.workers,
            options.max_bad_lines,
            options.log_interval,
            f"tokenising {corpus.name}",
        )
        keys = recipe.keys
        names = [corpus.name] if len(keys) == 1 else [f"{corpus.name}-{key}" for key in keys]
        made += zip(names, pairs.prefixes, strict=True)
        print(f"{pairs.line}; wrote {', '.join(pairs.prefixes)}", file=sys.stderr, flush=True)
        if corpus.left_out:
            print(f"{corpus.name}: {corpus.left_out} files of other kinds were left out",
                  file=sys.stderr)  # fmt: skip
    if any(len(prefix.split()) != 1 or ".bin" in prefix for _, prefix in made):
        print("no list was written: its paths hold no spaces and no .bin", file=sys.stderr)
        return
    path = Path(f"{options.output_prefix}.list")
    write_list(path, made, "weights by tokens")
    print(f"train on it: DATA_FILE_LIST={path} bash train_alcf.sh", file=sys.stderr)


def _corpora(options: argparse.Namespace) -> list[TextInput]:
    """The corpora of --input: one, or one for each file or folder."""
    found = [find_text(given, "--input") for given in options.input]
    if options.per_file:
        found = [find_text(path, "--input") for one in found for path in one.paths]
    elif not options.per_folder:
        paths = [path for one in found for path in one.paths]
        left_out = sum(one.left_out for one in found)
        found = [TextInput(found[0].name, tuple(paths), sum(f.size for f in found), left_out)]
    names = [one.name for one in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(
            f"--input: two corpora would be named {double}: rename one, or give them to two calls"
        )
    return found


def _require_keys(options: argparse.Namespace, corpora: Sequence[TextInput]) -> None:
    keys = options.json_keys
    plain = next((path for one in corpora for path in one.paths if is_plain(path)), None)
    if plain is not None and len(keys) != 1:
        raise ConfigError(
            f"--input {plain}: plain text has no keys, but --json-keys names {len(keys)}"
        )
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: a key is named twice")


def _tokenizer_model(options: argparse.Namespace, paths: Sequence[str]) -> str | None:
    """TOKENIZER_MODEL, from whichever flag gave it; what is made here lies beside the pairs."""
    if (options.vocab_file is None) != (options.merge_file is None):
        raise ConfigError("--vocab-file and --merge-file go together")
    if options.vocab_file is not None:
        if options.tokenizer_type != "GPT2BPETokenizer" or options.tokenizer_model is not None:
            raise ConfigError(
                "--vocab-file and --merge-file are for GPT2BPETokenizer without --tokenizer-model"
            )
        return f"{options.vocab_file},{options.merge_file}"
    model: str | None = options.tokenizer_model
    if model is None and options.tokenizer_type in OWN_MODELS:
        Path(options.output_prefix).parent.mkdir(parents=True, exist_ok=True)
        return OWN_MODELS[options.tokenizer_type](options, paths)
    return model


def _alphabet(options: argparse.Namespace, paths: Sequence[str]) -> str:
    """The characters of the input."""
    path = f"{options.output_prefix}_alphabet.json"
    characters: set[str] = set()
    for unit in text_input.units(paths, options.json_keys):
        for texts in text_input.texts(unit, options.json_keys).by_key.values():
            characters.update(*texts)
    CharTokenizer.write_alphabet(characters, path)
    print(f"alphabet of {len(characters)} characters: {path}", file=sys.stderr)
    return path


def _builtin(options: argparse.Namespace, paths: Sequence[str]) -> str:
    """A copy of the built-in tokenizer: another Python's is another one."""
    path = Path(f"{options.output_prefix}_tokenizer.model")
    if not path.is_file():
        path.write_bytes(Path(builtin_model()).read_bytes())
    return str(path)


OWN_MODELS = {"CharTokenizer": _alphabet, BUILTIN_TOKENIZER: _builtin}
"""Kinds whose model is made where none is given."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, globs, data sets that `datasets` saved, or hub:NAME: .jsonl and "
        ".json (one document per line), these as .gz or .zst, .parquet, .arrow, text "
        f"({', '.join(PLAIN[:5])}, ...)",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="keys to take, one pair each (default: text)",
    )
    add("--tokenizer-type", required=True, choices=sorted(TOKENIZERS), help="kind of tokenizer; "
        f"{BUILTIN_TOKENIZER} needs no network")  # fmt: skip
    add(
        "--tokenizer-model",
        help="name or path; CharTokenizer without one makes its alphabet from the input",
    )
    add("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    add("--merge-file", help="GPT2BPETokenizer: merges.txt")
    add("--vocab-size", type=int, help="NullTokenizer: number of ids, end of document included")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--output-prefix", required=True, help="writes <prefix>_<key>_document.bin and .idx")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--per-file", action="store_true", help="a pair and a corpus for each file: "
                       "<prefix>_<file>_<key>_document")  # fmt: skip
    pairs.add_argument("--per-folder", action="store_true", help="for each folder, file or name of "
                       "--input: <prefix>_<folder>_<key>_document")  # fmt: skip
    add("--workers", type=_positive, default=1, help="processes that tokenise (default: 1)")
    add("--max-bad-lines", type=int, default=100, help="more unusable lines than this: status 3")
    add("--log-interval", type=float, default=5.0, help="seconds between lines of progress")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

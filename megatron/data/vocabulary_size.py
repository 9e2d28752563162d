"""Vocabulary size of a tokenizer, from its name or its files, without loading it.

Only what fixes the shape of the model: the tokenizers themselves are in data/prepare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError

BUILTIN_VOCAB_SIZE = 4096  # the built-in corpus' SentencePiece model is trained to this size
BYTE_VOCAB_SIZE = 257  # 256 bytes and end-of-document
GPT2_VOCAB_SIZE = 50257

# Names on the Hugging Face Hub; the size is that of the model's embedding, added tokens included.
HUB_SIZES = (
    (r"google/gemma(-2|-1\.1)?-\d+b(-it)?", 256000),
    (r"meta-llama/llama-2-\d+b(-chat)?(-hf)?", 32000),
    (r"tinyllama/tinyllama.*", 32000),
    (r"meta-llama/(meta-)?llama-3(\.\d)?-\d+b(-instruct)?", 128256),
    (r"huggingfacetb/smollm3-3b(-base)?", 128256),
    (r"huggingfacetb/smollm2?-(135m|360m|1\.7b)(-instruct)?", 49152),
    (r"(openai-community/)?(gpt2(-medium|-large|-xl)?|distilgpt2)", GPT2_VOCAB_SIZE),
)


def vocabulary_size(kind: str, model: str | None, environ: Mapping[str, str]) -> int:
    """Rows that the embedding needs, before padding.

    Args:
        kind: TOKENIZER_TYPE.
        model: TOKENIZER_MODEL: a name on the Hub, a file or a folder.
        environ: locates the Hugging Face cache.

    Raises:
        ConfigError: neither the name nor a file gives it; set VOCAB_SIZE.
    """
    if kind == "BuiltinTokenizer" and not (model and Path(model).is_file()):
        return BUILTIN_VOCAB_SIZE
    if kind == "ByteTokenizer":
        return BYTE_VOCAB_SIZE
    if kind == "NullTokenizer":
        raise ConfigError(
            "TOKENIZER_TYPE=NullTokenizer has no vocabulary of its own: set VOCAB_SIZE to the "
            "largest token id + 1, end-of-document included"
        )
    if kind == "GPT2BPETokenizer" and model in (None, "gpt2"):
        return GPT2_VOCAB_SIZE
    if model is None:
        raise ConfigError(
            f"TOKENIZER_TYPE={kind} needs TOKENIZER_MODEL: a name or path of the tokenizer"
        )
    try:
        size = _size_of_model(kind, model, environ)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"TOKENIZER_MODEL={model} cannot be read as a {kind} ({error}); give a tokenizer of "
            "that type, or set VOCAB_SIZE"
        ) from None
    if size is None:
        raise ConfigError(
            f"TOKENIZER_MODEL={model}: the vocabulary size is not known by that name, and no "
            "tokenizer files were found there or in the Hugging Face cache; give a folder with "
            "tokenizer.json, or set VOCAB_SIZE"
        )
    return size


def _size_of_model(kind: str, model: str, environ: Mapping[str, str]) -> int | None:
    """Size by files at `model`, by its name, or by files in the Hugging Face cache."""
    # GPT2BPETokenizer also takes both its files as `vocab.json,merges.txt`.
    path = Path(model.partition(",")[0] if kind == "GPT2BPETokenizer" else model).expanduser()
    if path.exists():
        return _size_of_files(kind, path)
    if kind in ("HFTokenizer", "GPT2BPETokenizer"):
        return _hub_size(model) or _cached_size(model, environ)
    return None


def _hub_size(name: str) -> int | None:
    """Size of a tokenizer that is known by its name on the Hub."""
    for pattern, size in HUB_SIZES:
        if re.fullmatch(pattern, name.lower()):
            return size
    return None


def _cached_size(name: str, environ: Mapping[str, str]) -> int | None:
    """Size of a tokenizer in the Hugging Face cache."""
    for snapshot in cached_snapshots(name, environ):
        size = _size_of_files("HFTokenizer", snapshot)
        if size is not None:
            return size
    return None


def cached_snapshots(name: str, environ: Mapping[str, str]) -> list[Path]:
    """Folders of the Hugging Face cache that hold a repository, that of `main` first."""
    home = Path(environ.get("HOME", "~")).expanduser()
    cache_home = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(environ.get("HF_HOME") or cache_home / "huggingface") / "hub"
    hub = Path(environ.get("HF_HUB_CACHE") or hub)
    repository = hub / f"models--{name.replace('/', '--')}"
    main = repository / "refs" / "main"
    snapshots = [repository / "snapshots" / main.read_text().strip()] if main.is_file() else []
    return snapshots + sorted(repository.glob("snapshots/*"))


def _size_of_files(kind: str, path: Path) -> int | None:
    """Size of the tokenizer at a file or in a folder; None where no known file is there."""
    if path.is_file():
        return _size_of_file(kind, path)
    for name in ("tokenizer.json", "vocab.json", "gpt2-vocab.json", "tokenizer.model"):
        if (path / name).is_file():
            return _size_of_file(kind, path / name)
    return None


def _size_of_file(kind: str, path: Path) -> int:
    """Size of one tokenizer file, by what it holds."""
    if path.suffix == ".model" or kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        return sentencepiece_size(path.read_bytes())
    content = json.loads(path.read_text(encoding="utf-8"))
    if kind == "CharTokenizer":
        return len(content)  # a list of pieces, end-of-document included
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        return _tokenizer_json_size(content)
    return _largest_id(content) + 1


def _tokenizer_json_size(content: dict[str, Any]) -> int:
    """Largest id + 1 of a `tokenizers` file: its table or list of pieces, and added tokens."""
    pieces = content["model"]["vocab"]
    largest = _largest_id(pieces) if isinstance(pieces, dict) else len(pieces) - 1
    added = [token["id"] for token in content.get("added_tokens", ())]
    return int(max([largest, *added])) + 1


def _largest_id(table: Any) -> int:
    """Largest id of a token -> id table."""
    if not isinstance(table, dict):
        raise ValueError("it holds no table of tokens")
    return max(int(number) for number in table.values())


def sentencepiece_size(model: bytes) -> int:
    """Pieces of a SentencePiece model: field 1 of the protobuf, repeated.

    Raises:
        ValueError: where the bytes are not such a message.
    """
    position = pieces = 0
    while position < len(model):
        tag, position = _varint(model, position)
        wire, field = tag & 7, tag >> 3
        if wire == 0:
            _, position = _varint(model, position)
        elif wire == 1:
            position += 8
        elif wire == 2:
            length, position = _varint(model, position)
            position += length
        elif wire == 5:
            position += 4
        else:
            raise ValueError("not a SentencePiece model")
        pieces += field == 1
    if position != len(model) or pieces == 0:
        raise ValueError("not a SentencePiece model, or a truncated one")
    return pieces


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A protobuf integer of 7 bits per byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7

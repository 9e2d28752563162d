"""Tokenizers behind one interface: text to ids and back, vocabulary size, end of document.

None adds ids by itself: a document is its text's ids, and the end-of-document id on request.
Libraries are imported where they are used, so that byte, char and null data need none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron.config.errors import ConfigError
from megatron.data.hub_names import require_on_hub
from megatron.data.prepare.plain_tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    NullTokenizer,
    fingerprint_of,
)
from megatron.data.vocabulary_size import cached_snapshots

T = TypeVar("T")


class Tokenizer(Protocol):
    """What preparation, checks and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One above the largest id, so that ids are [0, vocab_size)."""

    @property
    def eod(self) -> int:
        """Id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with no id added before or after."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def fingerprint(self) -> str:
        """Hash of what defines the ids; equal for equal tokenizers wherever their files lie."""


def build_tokenizer(
    kind: str, model: str | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Tokenizer by the name of its kind (TOKENIZER_TYPE).

    Args:
        kind: a key of `TOKENIZERS`.
        model: TOKENIZER_MODEL: a name or path, according to kind.
        vocab_size: VOCAB_SIZE, used by NullTokenizer alone.

    Raises:
        ConfigError: unknown kind, missing or unreadable model, or a library that is not installed.
    """
    if kind not in TOKENIZERS:
        raise ConfigError(
            f"TOKENIZER_TYPE={kind} is unknown; known: {', '.join(sorted(TOKENIZERS))}"
        )
    return TOKENIZERS[kind](model, vocab_size)


class _Backed:
    """What tokenizers of the tokenizers library share."""

    vocab_size: int
    eod: int
    _backend: Any  # tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, without BOS or EOS."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens shown."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def definition(self) -> str:
        """The whole tokenizer as JSON, as tokenizer.json has it."""
        return str(self._backend.to_str())

    def fingerprint(self) -> str:
        """Hash of vocabulary, end of document and the ids of a probe."""
        return fingerprint_of(_by_id(self._backend.get_vocab()), self.eod, self.encode)


class HFTokenizer(_Backed):
    """A fast tokenizer of Hugging Face: a folder, or a name (local cache, then the hub)."""

    def __init__(self, model: str) -> None:
        """Load `model`; the end of document is the tokenizer's end of sequence."""
        _require_reachable(model)
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise _missing_library("HFTokenizer", "transformers") from error
        try:
            tokenizer = _cache_first(partial(AutoTokenizer.from_pretrained, model, use_fast=True))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"TOKENIZER_MODEL={model} cannot be loaded ({_first_line(error)}); on a machine "
                f"with network run `hf download {model}` first, or give the path of its folder"
            ) from error
        if not tokenizer.is_fast:
            raise ConfigError(f"TOKENIZER_MODEL={model} has no fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"TOKENIZER_MODEL={model} names no eos_token to end documents with")
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # One above the largest id, added tokens included.
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self.eod = int(tokenizer.eos_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens shown."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def beginning(self) -> list[int]:
        """Ids that its template puts before a text."""
        alone, whole = self.encode("a"), list(self._backend.encode("a").ids)
        places = range(len(whole) - len(alone) + 1)
        return whole[: next((n for n in places if whole[n : n + len(alone)] == alone), 0)]

    def save(self, folder: Path) -> None:
        """Writes its files into a folder, as AutoTokenizer reads them."""
        self._tokenizer.save_pretrained(folder)


class LoadedTokenizer(_Backed):
    """An HFTokenizer that another process has loaded; avoids the slow import of transformers."""

    def __init__(self, definition: str, vocab_size: int, eod: int) -> None:
        """Rebuild it from an HFTokenizer's `definition()`."""
        from tokenizers import Tokenizer as Backend

        self.vocab_size = vocab_size
        self.eod = eod
        self._backend = Backend.from_str(definition)


class SentencePieceTokenizer:
    """A SentencePiece model file, such as Llama 2's; BOS and EOS are never added."""

    def __init__(self, model: str) -> None:
        """Load `model`; the end of document is its eos_id, else its piece `</s>`."""
        try:
            import sentencepiece
        except ImportError as error:
            raise _missing_library("SentencePieceTokenizer", "sentencepiece") from error
        if not Path(model).is_file():
            raise ConfigError(
                f"TOKENIZER_MODEL={model} is not a file; give the path of a SentencePiece .model"
            )
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=model)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"TOKENIZER_MODEL={model} is not a SentencePiece model ({error})"
            ) from error
        eod = int(self._processor.eos_id())
        if eod < 0:
            eod = int(self._processor.piece_to_id("</s>"))
            if eod == self._processor.unk_id():
                raise ConfigError(
                    f"TOKENIZER_MODEL={model} has neither eos_id nor </s> to end documents with"
                )
        self._eod = eod

    @property
    def vocab_size(self) -> int:
        """Pieces of the model."""
        return int(self._processor.get_piece_size())

    @property
    def eod(self) -> int:
        """Id of the end of sequence."""
        return self._eod

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts; one thread, as callers run one process per core."""
        return [list(ids) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._processor.decode([int(i) for i in ids]))

    def pieces(self) -> list[str]:
        """The vocabulary, by id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def fingerprint(self) -> str:
        """Hash of pieces, end of document and the ids of a probe."""
        return fingerprint_of(self.pieces(), self.eod, self.encode)


class GPT2BPETokenizer(_Backed):
    """GPT-2's byte-level BPE from its vocabulary and merges."""

    def __init__(self, model: str) -> None:
        """Load a folder with vocab.json and merges.txt, `vocab.json,merges.txt`, or a name."""
        try:
            from tokenizers import Tokenizer as Backend
            from tokenizers import decoders, models, pre_tokenizers
        except ImportError as error:
            raise _missing_library("GPT2BPETokenizer", "tokenizers") from error
        vocab, merges = _gpt2_files(model)
        try:
            self._backend = Backend(models.BPE.from_file(vocab, merges))
        except Exception as error:  # the library raises plain Exception for unreadable files
            raise ConfigError(f"TOKENIZER_MODEL={model} cannot be read ({error})") from error
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._backend.decoder = decoders.ByteLevel()
        eod = self._backend.token_to_id(END_OF_TEXT)
        if eod is None:
            raise ConfigError(f"TOKENIZER_MODEL={model}: the vocabulary has no <|endoftext|>")
        self.vocab_size = int(self._backend.get_vocab_size())
        self.eod = int(eod)


def _require_reachable(model: str) -> None:
    """Refuse in two seconds what is neither here nor on the Hub; its library takes a minute."""
    if not Path(model).expanduser().exists() and not cached_snapshots(model, os.environ):
        require_on_hub("models", model, f"TOKENIZER_MODEL={model}", os.environ)


def _sentence_piece(model: str | None, vocab_size: int | None) -> Tokenizer:
    return SentencePieceTokenizer(
        _required("SentencePieceTokenizer", model, "a SentencePiece .model file")
    )


def _null(model: str | None, vocab_size: int | None) -> Tokenizer:
    if vocab_size is None or vocab_size < 2:
        raise ConfigError(
            "TOKENIZER_TYPE=NullTokenizer needs VOCAB_SIZE, 2 or more: its last id ends documents"
        )
    return NullTokenizer(vocab_size)


TOKENIZERS: dict[str, Callable[[str | None, int | None], Tokenizer]] = {
    "HFTokenizer": lambda model, _: HFTokenizer(
        _required("HFTokenizer", model, "a name such as google/gemma-7b, or a folder")
    ),
    "SentencePieceTokenizer": _sentence_piece,
    "GPTSentencePieceTokenizer": _sentence_piece,  # Megatron's second name for it
    "Llama2Tokenizer": _sentence_piece,
    "BuiltinTokenizer": lambda model, _: SentencePieceTokenizer(model or builtin_model()),
    "GPT2BPETokenizer": lambda model, _: GPT2BPETokenizer(model or "gpt2"),
    "ByteTokenizer": lambda *_: ByteTokenizer(),
    "CharTokenizer": lambda model, _: CharTokenizer.load(
        _required("CharTokenizer", model, "a JSON file with the alphabet")
    ),
    "NullTokenizer": _null,
}


def builtin_model() -> str:
    """The SentencePiece model that is made with the built-in corpus, in the user's cache."""
    from megatron.data.prepare.builtin import builtin_corpus

    model = builtin_corpus(log=lambda text: print(text, file=sys.stderr)).tokenizer_model
    assert model is not None
    return str(model)


def _required(kind: str, model: str | None, what: str) -> str:
    if not model:
        raise ConfigError(f"TOKENIZER_TYPE={kind} needs TOKENIZER_MODEL: {what}")
    return model


def _missing_library(kind: str, library: str) -> ConfigError:
    return ConfigError(
        f"TOKENIZER_TYPE={kind} needs the library {library}: run `python3 -m pip install {library}`"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _gpt2_files(model: str) -> tuple[str, str]:
    if "," in model:
        vocab, _, merges = model.partition(",")
        pairs = [(Path(vocab), Path(merges))]
    else:
        pairs = [
            (Path(model) / f"{p}vocab.json", Path(model) / f"{p}merges.txt") for p in ("", "gpt2-")
        ]
    for vocab_file, merges_file in pairs:
        if vocab_file.is_file() and merges_file.is_file():
            return str(vocab_file), str(merges_file)
    if "," not in model and not Path(model).exists():
        return _gpt2_files_of_hub(model)
    raise ConfigError(
        f"TOKENIZER_MODEL={model}: no such vocabulary and merges; give a folder with vocab.json "
        "and merges.txt, or both files as vocab.json,merges.txt"
    )


def _gpt2_files_of_hub(name: str) -> tuple[str, str]:
    """Vocabulary and merges from the local cache of the hub, then from the hub."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise _missing_library("GPT2BPETokenizer", "huggingface_hub") from error

    _require_reachable(name)

    def download(file: str) -> str:
        try:
            return _cache_first(partial(hf_hub_download, name, file))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"TOKENIZER_MODEL={name}: no such folder, and the hub gives no {file} "
                f"({_first_line(error)}); give a folder with vocab.json and merges.txt"
            ) from error

    return download("vocab.json"), download("merges.txt")


def _cache_first(load: Callable[..., T]) -> T:
    """Load from the local cache, then the hub: cached files need no network."""
    try:
        return load(local_files_only=True)
    except (OSError, ValueError):
        return load()


def _by_id(vocab: dict[str, int]) -> list[str]:
    """Tokens with their ids, in order of id."""
    return [
        f"{i} {token}" for token, i in sorted(vocab.items(), key=lambda item: (item[1], item[0]))
    ]

"""The built-in corpus: the text of the running Python's own standard library; needs no download.

Two corpora: `code`, its source files, and `prose`, their docstrings. Made once into a cache folder,
with a SentencePiece model trained on it where the user names no tokenizer; a folder appears whole
or not at all.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.data.data_list import DataSource
from megatron.data.file_lock import locked
from megatron.data.indexed import IndexedWriter, token_dtype
from megatron.data.indexed_header import read_header
from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.tokenizer import SentencePieceTokenizer, Tokenizer, build_tokenizer
from megatron.data.vocabulary_size import BUILTIN_VOCAB_SIZE

Log = Callable[[str], None]

# Shares of the samples; prose is the smaller corpus and repeats sooner.
WEIGHTS = {"code": 0.7, "prose": 0.3}
# Keeps preparation to seconds for any Python: 3.11 has 11 million characters of code, 1.6 of
# docstrings.
MAX_CHARACTERS = 12_000_000
TRAINING_CHARACTERS = 3_000_000  # of each corpus, for the SentencePiece model
# Tests and generated tables are unlike other code; the rest is not part of the library itself.
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "lib2to3", "idlelib", "encodings", "pydoc_data",
}  # fmt: skip
_BATCH = 64  # documents tokenised at a time
_FORMAT = 1  # part of the cache's key: raise it when what is made changes


@dataclass(frozen=True)
class BuiltinCorpus:
    """A finished built-in corpus."""

    entries: tuple[DataSource, ...]  # as if read from a data file list
    tokenizer: Tokenizer  # the one it was made with
    tokenizer_model: Path | None  # the SentencePiece model made with it; None: the user's tokenizer


def default_cache(environ: Mapping[str, str]) -> Path:
    """Cache folder of the user: $XDG_CACHE_HOME or ~/.cache, then the project's name."""
    home = Path(environ.get("HOME") or "~").expanduser()
    return Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "megatron-alcf"


def builtin_corpus(
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    log: Log = print,
    cache: Path | None = None,
    max_characters: int = MAX_CHARACTERS,
) -> BuiltinCorpus:
    """The corpus from the cache, made at first use; processes that race make it once.

    Args:
        tokenizer_type: TOKENIZER_TYPE; None or BuiltinTokenizer trains a SentencePiece model on
            the corpus, unless `tokenizer_model` names one.
        tokenizer_model: TOKENIZER_MODEL.
        log: called with a line about what is made and where.
        cache: folder of caches; by default the user's, a place and not a setting of the run.
        max_characters: characters taken of each corpus.

    Raises:
        DataError: the library has no source text, or the cached files are damaged.
        ConfigError: the cache cannot be written, or a library or tokenizer is missing.
    """
    own = tokenizer_type in (None, "BuiltinTokenizer") and not tokenizer_model
    tokenizer = (
        None if own else build_tokenizer(tokenizer_type or "BuiltinTokenizer", tokenizer_model)
    )
    cache = cache or default_cache(os.environ)
    maker = tokenizer.fingerprint() if tokenizer else "its own tokenizer"
    key = [_FORMAT, sys.version, max_characters, TRAINING_CHARACTERS, BUILTIN_VOCAB_SIZE, maker]
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
    name = f"builtin-py{platform.python_version()}-{digest}"
    folder = cache / name
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _make_once(folder, tokenizer, log, max_characters)
        except OSError as error:
            raise ConfigError(
                f"the built-in corpus cannot be written to {cache} ({error}): set XDG_CACHE_HOME "
                "to a folder that can be written, or DATA_FILE_LIST to data of your own"
            ) from error
    return _opened(folder, tokenizer)


def code_documents(library: Path, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Source files below a folder, in order of path, up to about `max_characters`."""
    documents, total = [], 0
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).parts):
        if LEFT_OUT.intersection(path.relative_to(library).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few files are in another encoding on purpose
        if text.strip():
            documents.append(text)
            total += len(text)
        if total >= max_characters:
            break
    return documents


def prose_documents(sources: Sequence[str], max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Docstrings of each source, in order of line, one document per source."""
    documents, total = [], 0
    for source in sources:
        text = "\n\n".join(_docstrings(source))
        if text:
            documents.append(text + "\n")
            total += len(text)
        if total >= max_characters:
            break
    return documents


def train_sentencepiece(documents: Sequence[Sequence[str]], vocab_size: int) -> bytes:
    """SentencePiece model (BPE, byte fallback, text kept as it is) of lines from several corpora.

    Deterministic: one thread, and lines taken at even intervals of each corpus.

    Raises:
        ConfigError: sentencepiece is not installed.
        DataError: the text is too little for the vocabulary.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            "the built-in corpus needs the library sentencepiece for its tokenizer: run "
            "`python3 -m pip install sentencepiece`, or set TOKENIZER_TYPE=ByteTokenizer"
        ) from error
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            byte_fallback=True,
            num_threads=1,
            # Spaces are meaning in code, and decode(encode(text)) must give the text back.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=1 << 14,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"no vocabulary of {vocab_size} pieces can be made of the corpus ({error})"
        ) from error
    return model.getvalue()


def _docstrings(source: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in files that are not ours
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # templates and deliberately broken files
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: 0 if isinstance(node, ast.Module) else node.lineno)
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _training_lines(documents: Sequence[Sequence[str]]) -> Iterator[str]:
    for corpus in documents:
        step = -(-sum(len(document) for document in corpus) // TRAINING_CHARACTERS)
        lines = (line for document in corpus for line in document.split("\n") if line.strip())
        for number, line in enumerate(lines):
            if number % step == 0:
                yield line


def _make_once(folder: Path, tokenizer: Tokenizer | None, log: Log, max_characters: int) -> None:
    """Make the corpus unless another process does so or has done so."""
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True) as held:
        if held:  # no other process is at work: leftovers are from one that died
            for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        if not folder.is_dir():
            _make(folder, tokenizer, log, max_characters)


def _make(folder: Path, tokenizer: Tokenizer | None, log: Log, max_characters: int) -> None:
    """Make the corpus in a temporary folder and rename it; the loser of a race drops its own."""
    started = time.monotonic()
    log(f"making the built-in corpus from Python's standard library, once, in {folder}")
    library = Path(sysconfig.get_paths()["stdlib"])
    code = code_documents(library, max_characters)
    corpora = {"code": code, "prose": prose_documents(code, max_characters)}
    for name, documents in corpora.items():
        if not documents:
            raise DataError(
                f"{library}: no {name} found for the built-in corpus; set DATA_FILE_LIST to data "
                "of your own"
            )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        if tokenizer is None:
            model = temporary / "tokenizer.model"
            model.write_bytes(train_sentencepiece(list(corpora.values()), BUILTIN_VOCAB_SIZE))
            tokenizer = SentencePieceTokenizer(str(model))
        tokens = sum(
            _write(str(temporary / name), documents, tokenizer)
            for name, documents in corpora.items()
        )
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, without a lock
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log(f"built-in corpus: {tokens:,} tokens in {time.monotonic() - started:.1f} s")


def _write(prefix: str, documents: Sequence[str], tokenizer: Tokenizer) -> int:
    """Tokenise one corpus; returns its tokens."""
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        for first in range(0, len(documents), _BATCH):
            for ids in tokenizer.encode_batch(documents[first : first + _BATCH]):
                writer.add_document([*ids, tokenizer.eod])
    write_note(prefix, tokenizer, append_eod=True)
    return writer.num_tokens


def _opened(folder: Path, tokenizer: Tokenizer | None) -> BuiltinCorpus:
    entries = tuple(
        DataSource(weight, str(folder / name), name, line)
        for line, (name, weight) in enumerate(WEIGHTS.items(), start=1)
    )
    model = folder / "tokenizer.model"
    try:
        for entry in entries:
            read_header(entry.prefix)
        if tokenizer is None and not model.is_file():
            raise DataError(f"{model} does not exist")
    except DataError as error:
        raise DataError(
            f"the cache of the built-in corpus is damaged ({error}): remove {folder}"
        ) from error
    if tokenizer is not None:
        return BuiltinCorpus(entries, tokenizer, None)
    return BuiltinCorpus(entries, SentencePieceTokenizer(str(model)), model)

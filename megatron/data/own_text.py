"""DATA: text of the user's own, prepared once into a folder that later runs share.

Here is what the folder is called and whether it is complete; data/prepare/prepare_text.py fills it.
Its name follows from the text's path, size and time and the tokenizer: a changed text has another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.data.text_files import HUB, find_text

BUILTIN_TOKENIZER = "BuiltinTokenizer"
MODEL = "tokenizer.model"  # the built-in tokenizer, kept beside what was made with it
RECORD = "prepared.json"
_FORMAT = 1  # part of the name: raise it when what is made changes


@dataclass(frozen=True)
class OwnText:
    """What must be prepared, in plain values.

    Attributes:
        given: DATA, as the user wrote it.
        paths: the files, or one name of the Hub.
        size: their bytes; 0: not known.
        left_out: files of the folder that are no text.
        key: column or key of JSON lines and tables that holds the text.
        tokenizer_type: TOKENIZER_TYPE.
        tokenizer_model: TOKENIZER_MODEL; of the built-in tokenizer the file in `folder`.
        vocab_size: VOCAB_SIZE.
        corpus: its name.
        folder: of what is made.
    """

    given: str
    paths: tuple[str, ...]
    size: int
    left_out: int
    key: str
    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int | None
    corpus: str
    folder: str

    @property
    def data_file_list(self) -> str:
        """The list that a run reads; written last, so what it names is complete."""
        return str(Path(self.folder) / f"{self.corpus}.list")

    @property
    def is_prepared(self) -> bool:
        """Whether nothing is left to do."""
        return Path(self.data_file_list).is_file()

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> OwnText:
        """The value of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "paths": tuple(values["paths"])})


def own_text(
    given: str,
    key: str,
    tokenizer_type: str,
    tokenizer_model: str | None,
    vocab_size: int | None,
    cache: Path,
) -> OwnText:
    """What DATA stands for.

    Args:
        given: DATA.
        key: DATA_KEY.
        tokenizer_type: TOKENIZER_TYPE.
        tokenizer_model: TOKENIZER_MODEL; None with the built-in tokenizer.
        vocab_size: VOCAB_SIZE where the tokenizer follows from it.
        cache: folder of such folders.

    Raises:
        DataError: there is no such text.
        ConfigError: a data list cannot hold the folder's name.
    """
    text = find_text(given, "DATA")
    paths = tuple(p if p.startswith(HUB) else str(Path(p).absolute()) for p in text.paths)
    builtin = tokenizer_type == BUILTIN_TOKENIZER and tokenizer_model is None
    models = _stats((tokenizer_model or "").split(","))
    maker = [tokenizer_type, tokenizer_model, models, vocab_size]
    facts = [_FORMAT, paths, _stats(paths), key, maker]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:10]
    folder = str(cache / f"{text.name}-{digest}")
    if len(folder.split()) != 1 or ".bin" in folder:
        raise ConfigError(
            f"DATA={given} would be prepared in {folder!r}, but paths in a data list have no "
            "spaces and no .bin: set DATA_CACHE_PATH to such a folder"
        )
    model = str(Path(folder) / MODEL) if builtin else tokenizer_model
    return OwnText(given, paths, text.size, text.left_out, key, tokenizer_type, model,
                   vocab_size, text.name, folder)  # fmt: skip


def prepared_text(own: OwnText) -> str:
    """One line about what is prepared, or will be."""
    tokenizer = own.tokenizer_type
    if own.tokenizer_model and Path(own.tokenizer_model).parent != Path(own.folder):
        tokenizer += f" {own.tokenizer_model}"
    if own.is_prepared:
        return f"DATA={own.given}: prepared in {own.folder} with {tokenizer}"
    return f"DATA={own.given}: {_amount(own)}, to be prepared in {own.folder} with {tokenizer}"


def _amount(own: OwnText) -> str:
    if not own.size:
        return "a data set of the Hub"
    left_out = f" ({own.left_out} of other kinds left out)" if own.left_out else ""
    files = "1 file" if len(own.paths) == 1 else f"{len(own.paths):,} files"
    return f"{files}{left_out}, {own.size / 1e6:,.1f} MB"


def require_same(own: OwnText, data_file_list: str) -> None:
    """Raise a DataError where a run was resolved for another state of the text."""
    if own.data_file_list != data_file_list:
        raise DataError(
            f"DATA={own.given} is not the text that this run was prepared from: it, or its "
            f"tokenizer, has changed, and {data_file_list} is gone. Put the text back, or start a "
            "new run with another RUN_NAME"
        )


def earlier(own: OwnText) -> str | None:
    """Folder of an earlier state of the same text, prepared before."""
    for record in sorted(Path(own.folder).parent.glob(f"{own.corpus}-*/{RECORD}")):
        try:
            known = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if record.parent != Path(own.folder) and known.get("paths") == list(own.paths):
            same = (known.get("tokenizer_type"), known.get("key")) == (own.tokenizer_type, own.key)
            if same:
                return str(record.parent)
    return None


def _stats(paths: Sequence[str]) -> list[list[int]]:
    """Size and time of each file; of a folder those of what lies in it."""
    found = []
    for path in paths:
        if path.startswith(HUB) or not path or not Path(path).expanduser().exists():
            continue
        one = Path(path).expanduser()
        stats = [file.stat() for file in ([one] if one.is_file() else sorted(one.iterdir()))]
        times = max((stat.st_mtime_ns for stat in stats), default=0)
        found.append([sum(stat.st_size for stat in stats), times])
    return found

"""What a user means by "my text": a file, a folder, a pattern, a saved data set, a name on the Hub.

Only which files are read and their sizes, without a library; data/prepare/text_input.py reads them.
"""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import NamedTuple

from megatron.config.errors import DataError

HUB = "hub:"  # hub:NAME[:CONFIG[:SPLIT]]
TRAIN = "train"  # the split that is read of a data set
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
TABLES = (".parquet", ".arrow")
PLAIN = (
    ".txt", ".text", ".md", ".rst", ".tex", ".csv", ".html", ".xml", ".yaml", ".toml",
    ".py", ".sh", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".f90", ".rs", ".go", ".java", ".js",
    ".ts", ".jl", ".r", ".sql",
)  # fmt: skip
"""Each such file is one document; in a folder, a file of another kind is left out."""
SUFFIXES = (*JSON_LINES, *TABLES, *PLAIN)
_PEEKED = 4096  # bytes in which a file shows that it is no text


class TextInput(NamedTuple):
    """What is read.

    Attributes:
        name: of the corpus, without what a list or a file name cannot hold.
        paths: files in order, or one name of the Hub.
        size: bytes of them; 0 where only the Hub knows.
        left_out: files of a folder that are no text by their names.
    """

    name: str
    paths: tuple[str, ...]
    size: int
    left_out: int = 0


def find_text(given: str, name: str) -> TextInput:
    """The text that a user names.

    Args:
        given: a file, a folder, a glob pattern, a data set's folder, or `hub:NAME`.
        name: the variable or flag that named it.

    Raises:
        DataError: there is none, or it is of a kind that is not read.
    """
    if given.startswith(HUB):
        hub_parts(given, name)
        return TextInput(_corpus(given.removeprefix(HUB)), (given,), 0)
    path, left_out = Path(given).expanduser(), 0
    if path.is_dir():
        paths, left_out = _of_folder(path, name)
    elif path.is_file():
        _require_text(path, name)
        paths = [path]
    else:
        paths = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not paths:
            raise DataError(
                f"{name}={given} does not exist (working folder {Path.cwd()}); give a text file, "
                f"a folder, .jsonl, .parquet, or {HUB}NAME for a data set of the Hub"
            )
        for one in paths:
            _require_text(one, name)
    size = sum(one.stat().st_size for one in paths)
    if not size:
        raise DataError(f"{name}={given} is empty")
    return TextInput(_corpus(path.name or path.resolve().name), tuple(map(str, paths)), size,
                     left_out)  # fmt: skip


def hub_parts(given: str, name: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of `hub:NAME[:CONFIG[:SPLIT]]`; raises DataError."""
    words = given.removeprefix(HUB).split(":")
    if len(words) > 3 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", words[0]):
        raise DataError(
            f"{name}={given}: write {HUB}NAME, {HUB}NAME:CONFIG or {HUB}NAME:CONFIG:SPLIT, e.g. "
            f"{HUB}stanfordnlp/imdb"
        )
    words += [""] * (3 - len(words))
    return words[0], words[1] or None, words[2] or TRAIN


def is_plain(path: str) -> bool:
    """Whether a file is one document of text."""
    return not path.endswith((*JSON_LINES, *TABLES)) and not path.startswith(HUB)


def _of_folder(folder: Path, name: str) -> tuple[list[Path], int]:
    """The text files below a folder, and how many others are there."""
    arrow = _saved_data_set(folder, name)
    if arrow is not None:
        return arrow, 0
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    paths = [path for path in files if path.name.endswith(SUFFIXES) and path.stat().st_size]
    if not paths:
        kinds = sorted({path.suffix for path in files if path.suffix})
        held = f" (it holds {', '.join(kinds[:8])})" if kinds else ""
        fix = f"known: {', '.join(SUFFIXES)}; name a file of another kind itself"
        if ".bin" in kinds and ".idx" in kinds:
            fix = "these are tokens: tools/make_data_list.py makes a list for DATA_FILE_LIST"
        raise DataError(f"{name}={folder}: no text file in the folder{held}; {fix}")
    return paths, len(files) - len(paths)


def _saved_data_set(folder: Path, name: str) -> list[Path] | None:
    """Files of what `datasets`' save_to_disk wrote, of its training split; None for others."""
    if (folder / "dataset_dict.json").is_file():
        if (folder / TRAIN).is_dir():
            return _saved_data_set(folder / TRAIN, name)
        raise DataError(
            f"{name}={folder}: the data set has no split {TRAIN}; give the folder of another one"
        )
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        files = [folder / one["filename"] for one in json.loads(state.read_text())["_data_files"]]
        missing = [file for file in files if not file.is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a state.json of something else
    if missing:
        raise DataError(f"{missing[0]} is missing: copy the data set's whole folder")
    return files


def _require_text(path: Path, name: str) -> None:
    """Refuse a single file that is no text, whatever its name."""
    if path.name.endswith((*JSON_LINES, *TABLES)):
        return
    with path.open("rb") as file:
        start = file.read(_PEEKED)
    if b"\0" in start or path.suffix in (".gz", ".zst", ".zip", ".xz", ".bz2", ".pdf"):
        raise DataError(
            f"{name}={path} is no text; read are text files, {', '.join(JSON_LINES)}, "
            f"{', '.join(TABLES)} and folders of them"
        )


def _corpus(name: str) -> str:
    """A name for files and lists: without suffix, spaces and what a list takes for its own."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    return name or "text"

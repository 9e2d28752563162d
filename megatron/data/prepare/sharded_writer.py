"""A pair that grows by whole shards of bytes and resumes after an interruption.

Tokens and lengths lie in a work folder beside the pair. A journal records how much of them is
valid; what an interrupted writer left beyond that is truncated. `commit` names the pair.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.data.file_lock import locked
from megatron.data.indexed import commit_pair

_JOURNAL = "journal.json"
_LENGTH_LIMIT = 2**31
_COPY_BYTES = 1 << 24


class ShardedWriter:
    """Several pairs of one dtype, written together; a document is one sequence.

    Attributes:
        progress: what the last journal holds besides sizes: {} at a new start.
    """

    def __init__(
        self, prefixes: Sequence[str], dtype: np.dtype[Any], folder: Path, task: object
    ) -> None:
        """Resume where a journal of the same task ends, else begin.

        Args:
            prefixes: of the pairs.
            dtype: of the tokens.
            folder: work folder; made, and removed by `commit` and `abandon`.
            task: all that decides the output, as JSON: another task starts over.

        Raises:
            ConfigError: another process is at work here, or the folder cannot be made.
        """
        self.prefixes = tuple(prefixes)
        self.folder = folder
        self._dtype = np.dtype(dtype)
        self._task = json.loads(json.dumps(task))
        folder.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()  # the lock and the files, while this lives
        if self._open.enter_context(locked(folder / "lock", wait=False)) is False:
            raise ConfigError(
                f"{folder}: another process writes this output; wait for it, or give another "
                "--output-prefix"
            )
        journal = self._read_journal()
        self.progress: dict[str, Any] = journal.get("progress", {})
        self._complete = bool(journal.get("complete", False))
        self._sizes: list[list[int]] = journal.get("sizes", [[0, 0] for _ in prefixes])
        self._open_length: list[int] = journal.get("open", [0] * len(self.prefixes))
        self._data: list[IO[bytes]] = []
        self._lengths: list[IO[bytes]] = []
        for number, (tokens, lengths) in enumerate(self._sizes):
            self._lengths.append(self._opened_at(number, "lengths", lengths))
            if not self._complete:  # else it may be renamed already
                self._data.append(self._opened_at(number, "bin", tokens))

    @property
    def tokens(self) -> int:
        """Tokens of all pairs so far."""
        return sum(size for size, _ in self._sizes) // self._dtype.itemsize

    def shard_path(self, unit: int, number: int) -> Path:
        """Where a worker writes the tokens of a unit for pair `number`."""
        return self.folder / f"unit-{unit:08d}-{number}.bin"

    def append(
        self, unit: int, lengths: Sequence[npt.NDArray[np.int64]], ends_document: bool
    ) -> None:
        """Add a unit's shards, by copying their bytes, and remove them.

        Args:
            unit: its number.
            lengths: tokens of each document of the unit, for each pair.
            ends_document: False: the unit's one document continues in the next unit.
        """
        for number, sizes in enumerate(lengths):
            shard = self.shard_path(unit, number)
            self._sizes[number][0] += _copy(shard, self._data[number])
            shard.unlink()
            sizes = sizes.copy()
            if len(sizes):
                sizes[0] += self._open_length[number]
            elif self._open_length[number] and ends_document:
                sizes = np.array([self._open_length[number]])
            self._open_length[number] = 0
            if not ends_document:
                assert len(sizes) <= 1, "a piece of a document holds one"
                self._open_length[number] = int(sizes.sum())
                continue
            sizes = sizes[sizes > 0]  # a document needs a token
            if len(sizes) and int(sizes.max()) >= _LENGTH_LIMIT:
                raise DataError(
                    f"{self.prefixes[number]}.idx: a document of {int(sizes.max())} tokens, "
                    "but the format holds 2^31 - 1; split it"
                )
            self._sizes[number][1] += self._lengths[number].write(sizes.astype("<i4").tobytes())

    def save(self, progress: dict[str, Any]) -> None:
        """Make what was appended durable: a later start resumes here."""
        self.progress = progress
        for file in [*self._data, *self._lengths]:
            file.flush()
            os.fsync(file.fileno())
        self._write_journal(complete=False)

    def commit(self) -> None:
        """Write the indices and name all pairs; may be repeated after an interruption."""
        assert not any(self._open_length), "the last document was not ended"
        if not self._complete:
            self.save(self.progress)
            self._write_journal(complete=True)
        for number, prefix in enumerate(self.prefixes):
            data = self._path(number, "bin")
            if not data.exists():  # it was renamed before an interruption
                data = Path(f"{prefix}.bin")
            commit_pair(data, prefix, self._dtype, self._lengths[number])

    def abandon(self) -> None:
        """Remove everything in the work folder, and the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Leave the work as it is, for a later start."""
        self._open.close()

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"pair-{number}.{suffix}"

    def _read_journal(self) -> dict[str, Any]:
        """The journal of the same task; all other files here are removed."""
        try:
            journal: dict[str, Any] = json.loads((self.folder / _JOURNAL).read_text())
        except (OSError, ValueError):
            journal = {}
        if journal.get("task") != self._task:
            journal = {}
        for path in self.folder.iterdir():
            kept = path.name in ("lock", _JOURNAL) or path.name.startswith("pair-")
            if path.name != "lock" and not (journal and kept):
                path.unlink()
        return journal

    def _write_journal(self, complete: bool) -> None:
        journal = {
            "task": self._task,
            "sizes": self._sizes,
            "open": self._open_length,
            "progress": self.progress,
            "complete": complete,
        }
        write_atomically(self.folder / _JOURNAL, json.dumps(journal))

    def _opened_at(self, number: int, suffix: str, size: int) -> IO[bytes]:
        """A work file truncated to its valid size, open at its end."""
        path = self._path(number, suffix)
        path.touch()
        file = self._open.enter_context(path.open("r+b"))
        file.truncate(size)
        file.seek(size)
        return file


def _copy(source: Path, target: IO[bytes]) -> int:
    """Append a file's bytes; returns how many."""
    before = target.tell()
    with open(source, "rb") as file:
        shutil.copyfileobj(file, target, _COPY_BYTES)
    return target.tell() - before

"""The samples of one file in one split, in a shuffled order that is computed, not stored.

A file of T tokens has (T - 1) // S samples: sample j is tokens j*S .. (j+1)*S inclusive. A split is
a contiguous range of them. Draw k is pass k // n over the range of n samples, each pass permuted by
a key of its own.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.permutation import Permutation, round_keys

Tokens = npt.NDArray[np.int64]

_MOST_OPEN_FILES = 4096


class FileSamples:
    """The samples [first, first + n) of one file, drawn without end."""

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype[Any],
        seq_length: int,
        share: range,
        seed: int,
        identity: str,
        pool: FilePool,
        drawn: int = 0,
    ) -> None:
        """Samples of a split's share of a file.

        Args:
            prefix: path of the pair without its suffix.
            dtype: of the tokens of `.bin`.
            seq_length: S.
            share: sample numbers of the file that belong to the split, not empty.
            seed: the run's.
            identity: names the file in the permutation's key.
            pool: opens the file.
            drawn: draws that earlier stages of the run took; draw 0 is the one after them.
        """
        assert len(share) > 0
        self.prefix = prefix
        self.share = share
        self.identity = identity
        self.drawn = drawn
        self._dtype = dtype
        self._seq_length = seq_length
        self._seed = seed
        self._pool = pool
        self._permutation: tuple[int, Permutation] | None = None

    def locate(self, draw: int) -> tuple[int, int]:
        """Epoch, and sample number within the file, of a draw >= 0."""
        epoch, position = divmod(self.drawn + draw, len(self.share))
        return epoch, self.share[self._order(epoch)(position)]

    def draw_of(self, epoch: int, index: int) -> int:
        """The draw that gives sample `index` in an epoch; negative: an earlier stage's."""
        position = self._order(epoch).inverse(index - self.share.start)
        return epoch * len(self.share) + position - self.drawn

    def read(self, index: int) -> Tokens:
        """Tokens of a sample of the file, int64 of shape (S + 1,), a copy."""
        size = self._dtype.itemsize
        start, count = index * self._seq_length, self._seq_length + 1
        data = self._pool.read(f"{self.prefix}.bin", start * size, count * size)
        return np.frombuffer(data, dtype=self._dtype).astype(np.int64)

    def _order(self, epoch: int) -> Permutation:
        """Order of the samples in one epoch."""
        cached = self._permutation  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            keys = round_keys(self._seed, self.identity, epoch)
            cached = (epoch, Permutation(len(self.share), keys))
            self._permutation = cached
        return cached[1]


class FilePool:
    """A bounded number of open files: opened when first read, the least recently used closed first.

    Reads with `pread`, not through maps: a page fault at a random place reads far around it
    (measured: 4 ms cold against 0.03 ms), and truncating a mapped file kills the process, whereas a
    short read can be explained.
    """

    def __init__(self, capacity: int | None = None) -> None:
        """Pool of at most `capacity` files, by default half the descriptors of this process."""
        self.capacity = default_capacity() if capacity is None else capacity
        assert self.capacity > 0
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """The `size` bytes at byte `offset` of a file; threads may read at the same time.

        Raises:
            DataError: the file cannot be read, or is shorter than it was when the run started.
        """
        try:
            file = self._open(path)
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size:  # network file systems may return less
                more = os.pread(file.descriptor, size - len(data), offset + len(data))
                if not more:
                    raise DataError(
                        f"{path}: ends at byte {offset + len(data)}, but {size} bytes at {offset} "
                        "belong to a sample: it was truncated during the run; restore it"
                    )
                data += more
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); restore it") from error
        return data

    def _open(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _OpenFile(os.open(path, os.O_RDONLY))
                if len(self._files) > self.capacity:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file


class _OpenFile:
    """A descriptor that is closed once neither the pool nor a reader holds it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def default_capacity() -> int:
    """Half the descriptors this process may have: the rest is for sockets, logs, checkpoints."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(_MOST_OPEN_FILES, soft // 2)) if soft > 0 else _MOST_OPEN_FILES

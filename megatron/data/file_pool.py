"""A bounded pool of open files, so that a list of thousands of them needs few descriptors.

Reads with `pread`, not through maps: a page fault at a random place reads far around it (measured:
4 ms cold against 0.03 ms), and a file that is cut short while it is mapped kills the process, where
a short read can be explained.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict

from megatron.config.errors import DataError

_LARGEST = 4096


def default_capacity() -> int:
    """Half the descriptors this process may have: the rest is for sockets, logs, checkpoints."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(_LARGEST, soft // 2)) if soft > 0 else _LARGEST


class FilePool:
    """Files opened when first read; the one unused longest is closed when the pool is full."""

    def __init__(self, capacity: int | None = None) -> None:
        """Pool of at most `capacity` files, by default as many as the process may well open."""
        self.capacity = default_capacity() if capacity is None else capacity
        assert self.capacity > 0
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_open(self) -> int:
        """Files open now."""
        return len(self._files)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """The `size` bytes at byte `offset` of a file; threads may read at the same time.

        Raises:
            DataError: the file cannot be read, or is shorter than it was when the run started.
        """
        try:
            file = self._open(path)
            data = os.pread(file.descriptor, size, offset)
            while len(data) < size:  # network file systems may give a part
                more = os.pread(file.descriptor, size - len(data), offset + len(data))
                if not more:
                    raise DataError(
                        f"{path}: ends at byte {offset + len(data)}, but {size} bytes at {offset} "
                        "belong to a sample: it was cut short during the run; restore it"
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

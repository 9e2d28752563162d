"""The pool of open files: bounded, right under threads, and clear about a file that changes."""

import os
import random
import threading
from pathlib import Path

import pytest

from megatron.config.errors import DataError
from megatron.data.samples import FilePool, default_capacity


def _files(folder: Path, count: int) -> list[str]:
    paths = [folder / f"{i}.bin" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 100)
    return [str(path) for path in paths]


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_in_turn_never_hold_more_than_the_capacity(tmp_path):
    paths, pool, before = _files(tmp_path, 20), FilePool(3), _descriptors()
    for _ in range(3):
        for i, path in enumerate(paths):
            assert pool.read(path, 90, 10) == bytes([i]) * 10
            assert _descriptors() - before <= 3
    assert _descriptors() - before == 3
    del pool
    assert _descriptors() == before


def test_the_file_unused_longest_is_the_one_closed(tmp_path, monkeypatch):
    paths, pool, opened = _files(tmp_path, 3), FilePool(2), []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path) or real(path, flags))
    for i in (0, 1, 0, 2, 0):  # 2 takes the place of 1, not of 0
        pool.read(paths[i], 0, 1)
    assert opened == paths


def test_threads_that_evict_each_others_files_read_right(tmp_path):
    paths, pool, wrong = _files(tmp_path, 8), FilePool(1), []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(500):
            i = draw.randrange(8)
            if pool.read(paths[i], 0, 100) != bytes([i]) * 100:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_cut_short_or_gone_is_named(tmp_path):
    (path,), pool = _files(tmp_path, 1), FilePool(1)
    assert len(pool.read(path, 0, 100)) == 100
    os.truncate(path, 50)
    with pytest.raises(DataError, match=r"0\.bin: ends at byte 50, but 100 bytes at 0"):
        pool.read(path, 0, 100)
    with pytest.raises(DataError, match=r"gone\.bin: cannot be read"):
        pool.read(str(tmp_path / "gone.bin"), 0, 1)


def test_the_default_leaves_room_for_other_descriptors():
    assert 16 <= default_capacity() <= 4096

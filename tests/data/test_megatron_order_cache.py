"""The cache of Megatron's order: what its files depend on, and what becomes of damaged ones."""

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import struct
import time
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.numpy

from megatron.config.errors import DataError
from megatron.data.file_lock import locked
from megatron.data.megatron_order import build_once
from megatron.data.megatron_order.array_file import Damaged, NewArray, read_arrays, write_arrays
from tests.data.megatron_cases import build, write_pair

WHOLE = 1 << 40


@pytest.fixture
def lines(tmp_path):
    files = {"a": [20] * 90, "b": [7] * 200, "c": [30, 1] * 50}
    pairs = {name: write_pair(tmp_path / "data" / name, sizes) for name, sizes in files.items()}
    return [(0.5, pairs["a"], "x"), (0.2, pairs["b"], "x"), (0.3, pairs["c"], "y")]


def tokens(splits):
    return [
        [split.sample(k).tokens.tolist() for k in range(len(split))]
        for split in (splits.train, splits.valid, splits.test)
    ]


def names(folder):
    return {path.name for path in folder.glob("*.safetensors")}


def test_a_second_start_builds_nothing_and_gives_the_same(tmp_path, lines):
    said = []
    first = tokens(build(tmp_path / "cache", lines, said.append))
    assert said and all("built" in line or "building" in line for line in said)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    said.clear()
    assert tokens(build(tmp_path / "cache", lines, said.append)) == first
    assert not said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == times


@pytest.mark.parametrize("deed", ["cut", "lengthen", "header", "array", "empty", "remove"])
def test_a_damaged_file_is_built_again_and_said(tmp_path, lines, deed):
    cache = tmp_path / "cache"
    good = tokens(build(cache, lines))
    for name in sorted(names(cache)):
        path = cache / name
        content = path.read_bytes()
        damage(path, content, deed)
        said = []
        assert tokens(build(cache, lines, said.append)) == good
        assert path.read_bytes() == content
        assert sum(f"{name} (" in line for line in said) == (deed != "remove"), said


def damage(path, content, deed):
    if deed == "remove":
        path.unlink()
        return
    changed = bytearray(content)
    if deed == "header":
        changed[content.index(b"}", content.index(b'"facts"')) - 1] ^= 1  # a digit of a number
    if deed == "array":
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        del header["__metadata__"]
        for array in header.values():
            changed[8 + length + array["data_offsets"][0]] ^= 1
    keep = {"cut": -1, "empty": -len(content)}.get(deed)
    path.write_bytes(bytes(changed[:keep]) + (b"\0" if deed == "lengthen" else b""))


def test_damage_in_a_large_file_is_found_when_it_is_opened(tmp_path, lines):
    cache = tmp_path / "cache"
    good = tokens(build(cache, lines))
    said = []
    for path in cache.glob("file-*"):
        damage(path, path.read_bytes(), "array")
    splits = build(cache, lines, said.append, check_up_to=0)
    assert not said
    assert tokens(splits) == good
    assert len([line for line in said if "array" in line]) == len(list(cache.glob("file-*")))


def test_everything_that_matters_gives_other_files(tmp_path, lines):
    cache = tmp_path / "cache"
    build(cache, lines)
    files = names(cache)
    everything = {"file", "corpus", "blend"}
    runs = [
        ({"seed": 5}, {"file", "corpus"}),
        ({"seq_length": 15}, {"file"}),
        ({"train_iters": 400}, everything),
        ({"global_batch_size": 9}, everything),
        ({"shares": (80.0, 18.0, 2.0)}, {"file"}),
        ({"blend_in_corpus": True}, {"corpus"}),
        ({"shuffle_in_corpus": False}, {"corpus"}),
        ({"eval_iters": 3}, everything),
    ]
    lines = [line for line in lines if line[2] == "x"]
    build(cache, lines)
    files |= names(cache)
    for changes, kinds in runs:
        build(cache, lines, **changes)
        assert {name.partition("-")[0] for name in names(cache) - files} == kinds, changes
        files = names(cache)
    build(cache, [(0.1, *lines[0][1:]), *lines[1:]])
    assert names(cache) > files


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_that_changed_is_indexed_again(tmp_path, lines, suffix):
    cache = tmp_path / "cache"
    build(cache, lines)
    before = names(cache)
    os.utime(lines[0][1] + suffix, ns=(1, 1))
    build(cache, lines)
    changed = names(cache) - before
    assert len(changed) == 3 and all(name.startswith("file-") for name in changed)


def test_a_file_that_changes_while_it_is_indexed_is_refused(tmp_path, lines, monkeypatch):
    from megatron.data.megatron_order import recipes

    whole = recipes.write_arrays

    def touch_and_write(*arguments):
        os.utime(lines[0][1] + ".bin", ns=(1, 1))
        whole(*arguments)

    monkeypatch.setattr(recipes, "write_arrays", touch_and_write)
    with pytest.raises(DataError, match="changed while its index was built"):
        build(tmp_path / "cache", lines)


def test_another_key_is_not_taken(tmp_path):
    path = tmp_path / "f"
    with open(path, "wb") as file:
        new = NewArray(np.dtype("<i4"), (3,), [np.arange(2), np.arange(2, 3)])
        write_arrays(file, "one", {"n": 3}, {"numbers": new})
    found = read_arrays(path, "one", WHOLE)
    assert safetensors.numpy.load_file(path)["numbers"].tolist() == [0, 1, 2]
    assert found.facts == {"n": 3} and found.arrays["numbers"].tolist() == [0, 1, 2]
    assert not found.arrays["numbers"].flags.writeable
    with pytest.raises(Damaged, match="something else"):
        read_arrays(path, "two", WHOLE)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path, lines):
    cache = tmp_path / "cache"
    build(cache, lines)
    victim = sorted(cache.glob("corpus-*"))[0]
    dead = cache / f".{victim.name}.{platform.node()}-1-xyz.partial"
    other_host = cache / f".{victim.name}.another-host-1-xyz.partial"
    dead.write_bytes(b"half")
    other_host.write_bytes(b"half")
    victim.unlink()
    build(cache, lines)
    assert victim.exists() and other_host.exists() and not dead.exists()


def test_a_leftover_of_a_living_process_is_kept(tmp_path, lines):
    cache = tmp_path / "cache"
    build(cache, lines)
    leftover = cache / f".other.safetensors.{platform.node()}-1-xyz.partial"
    leftover.write_bytes(b"half")
    with holding(cache, "other.safetensors"):
        next(cache.glob("corpus-*")).unlink()
        build(cache, lines)
        assert leftover.exists()
    next(cache.glob("corpus-*")).unlink()
    build(cache, lines)
    assert not leftover.exists()


def test_a_file_gets_its_name_when_it_is_complete(tmp_path, lines, monkeypatch):
    complete, early = set(), set()
    flush, cache = os.fsync, tmp_path / "cache"

    def named():
        return {path.stat().st_ino for path in cache.glob("*.safetensors")}

    def watch(descriptor):
        early.update(named() & {os.fstat(descriptor).st_ino})
        flush(descriptor)
        complete.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watch)
    build(cache, lines)
    assert named() <= complete
    assert not early


def test_a_cache_of_an_earlier_version_is_rebuilt_and_named(tmp_path, lines):
    cache, said = tmp_path / "cache", []
    cache.mkdir()
    (cache / ".locks").write_bytes(b"")
    (cache / "file-0123.order").write_bytes(b"MGORDER\x01")
    build(cache, lines, said.append)
    assert any("1 *.order files of an earlier version" in line for line in said)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_files_are_built_all_the_same(tmp_path, lines, monkeypatch, code):
    good = tokens(build(tmp_path / "other", lines))

    def refuse(*arguments):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert tokens(build(tmp_path / "cache", lines)) == good


def hold(folder, name, ready, seconds):
    with locked(build_once.lock_path(folder / name), wait=False) as held:
        assert held
        ready.set()
        time.sleep(seconds)
        os._exit(9)  # dies with the lock


@contextmanager
def holding(folder, name, seconds=60.0):
    """Another process holds a lock in the block, for at most some seconds."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(folder, name, ready, seconds))
    holder.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        holder.kill()
        holder.join(30)


def test_a_lock_is_waited_for_and_vanishes_with_its_holder(tmp_path, lines, monkeypatch):
    cache = tmp_path / "cache"
    good = tokens(build(cache, lines))
    victim = sorted(cache.glob("blend-*"))[0]
    victim.unlink()
    monkeypatch.setattr(build_once, "_LOG_AFTER_S", 0.2)
    said = []
    with holding(cache, victim.name, seconds=1.0):
        assert tokens(build(cache, lines, said.append)) == good
    assert any("waiting for another process to build 1 files" in line for line in said)

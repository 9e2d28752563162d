"""Any damage to any file of a checkpoint: named, set aside, the step before used, saved again."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Finished
from tests.faults.harness import (
    LAYOUTS,
    committed,
    digests,
    each,
    step_folder,
    steps,
    tensor_digests,
    train,
)

STEPS = 12
BEFORE = 8
Damage = Callable[[Path], None]


def flip(place: float | int) -> Damage:
    """One bit of the byte at a place: a number of bytes, or a share of the file."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = place if isinstance(place, int) else int(place * len(content))
        content[at] ^= 1
        path.write_bytes(content)

    return damage


def cut(share: float) -> Damage:
    """Only the first share of the file is left; always less than all."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])

    return damage


def remove(path: Path) -> None:
    """The file is gone."""
    path.unlink()


def folder(path: Path) -> None:
    """A folder has its name."""
    path.unlink()
    path.mkdir()


def replace(content: bytes) -> Damage:
    """Something else has its name."""
    return lambda path: (path.write_bytes(content), None)[1]


def not_utf8(path: Path) -> None:
    """A byte that no text has."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff" + content[len(content) // 2 :])


def edit(pattern: str, number: int, change: Callable[[str], str]) -> Damage:
    """The number-th match of a pattern is changed; what it stands in stays JSON."""

    def damage(path: Path) -> None:
        text = path.read_text()
        match = list(re.finditer(pattern, text))[number]
        changed = change(match[1])
        assert changed != match[1]
        text = text[: match.start(1)] + changed + text[match.end(1) :]
        json.loads(text)
        path.write_text(text)

    return damage


KEY = r'"(\w+)": '
NUMBER = r": (\d+)[,\n}]"


def another_letter(key: str) -> str:
    """A key of the same length with one wrong letter."""
    return key[:-1] + ("q" if key[-1] != "q" else "x")


def another_digit(number: str) -> str:
    """A number of the same length with one wrong digit."""
    return number[:-1] + str((int(number[-1]) + 1) % 10)


ANY_FILE: dict[str, Damage] = {
    "first byte": flip(0),
    "header": flip(20),
    "middle": flip(0.5),
    "last byte": flip(-1),
    "empty": cut(0.0),
    "half": cut(0.5),
    "0.999": cut(0.999),
    "removed": remove,
    "a folder": folder,
}
ANY_JSON: dict[str, Damage] = {
    "not UTF-8": not_utf8,
    "a list": replace(b"[1, 2]\n"),
    "another object": replace(b'{"files": {}, "iteration": 12, "format": 1}\n'),
    "null": replace(b"null\n"),
}
CURSOR = "wrong data cursor"  # a number that is as good as the right one, but for the digest
FIRST, CHOSEN = 3, 3  # keys and numbers of a file, the latter by chance


def damages(step: Path, rng: random.Random) -> Iterator[tuple[str, str, Damage]]:
    """(file, name, damage) of all files of a step."""
    for path in sorted(step.iterdir()):
        for name, damage in ANY_FILE.items():
            yield path.name, name, damage
        if path.suffix != ".json":
            continue
        for name, damage in ANY_JSON.items():
            yield path.name, name, damage
        text = path.read_text()
        if path.name == "manifest.json":
            yield path.name, CURSOR, edit(r'"consumed_samples": (\d+)', 0, another_digit)
        for pattern, change in ((KEY, another_letter), (NUMBER, another_digit)):
            found = [match[1] for match in re.finditer(pattern, text)]
            # The first are those that decide how the rest is read.
            chosen = {*range(min(FIRST, len(found)))}
            chosen |= {*rng.sample(range(len(found)), min(CHOSEN, len(found)))}
            for number in sorted(chosen):
                name = f"{change.__name__} in {found[number]}, number {number}"
                yield path.name, name, edit(pattern, number, change)


def starts_from_the_step_before(
    whole: Path, root: Path, settings: dict[str, str], about: tuple[str, str, Damage]
) -> str:
    """One damage to the newest step of a copy of a finished run, then a start."""
    file, name, damage = about
    run = root / re.sub(r"\W+", "-", f"{file} {name}")
    shutil.copytree(whole, run)
    try:
        newest = step_folder(run, STEPS)
        damage(newest / file)
        ended = train(run, **settings)
        assert ended.status == 0, ended.output
        assert file in ended.output, f"{file} is not named:\n{ended.output}"
        assert newest.name in ended.output, f"{newest.name} is not named:\n{ended.output}"
        resumed = re.findall(r"resumed from \S*step-(\d+)", ended.output)
        assert resumed == [f"{BEFORE:08d}"], f"resumed from {resumed}:\n{ended.output}"
        aside = [path.name for path in newest.parent.glob(f"{newest.name}.damaged-*")]
        assert len(aside) == 1, f"set aside: {aside}\n{ended.output}"
        assert committed(run) == committed(whole)
        assert tensor_digests(run, STEPS) == tensor_digests(whole, STEPS)
        assert steps(run) == list(range(1, STEPS + 1))
    finally:
        shutil.rmtree(run)
    return ""


def check(
    layout: str, finished: Finished, data: str, root: Path, wanted: Callable[[str, str], bool]
) -> int:
    """All wanted damages of a layout; returns how many."""
    whole = finished(layout)
    settings = {**LAYOUTS[layout], "DATA_FILE_LIST": data}
    cases = [
        about
        for about in damages(step_folder(whole, STEPS), random.Random(8))
        if wanted(about[0], about[1])
    ]
    each(lambda about: starts_from_the_step_before(whole, root, settings, about), cases)
    return len(cases)


def test_some_damage(finished: Finished, data: str, tmp_path: Path) -> None:
    few = {("manifest.json", name) for name in ("half", "removed", CURSOR)}
    wanted = {*few, ("rank-00000-of-00001.safetensors", "middle")}
    assert check("one", finished, data, tmp_path, lambda *about: about in wanted) == len(wanted)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_region_of_every_file(finished: Finished, data: str, tmp_path: Path) -> None:
    assert check("one", finished, data, tmp_path, lambda file, name: True) >= 60


@pytest.mark.long
@pytest.mark.timeout(900)
def test_each_file_of_four_ranks(finished: Finished, data: str, tmp_path: Path) -> None:
    kinds = {"last byte", "removed"}
    assert check("tp2-pp2", finished, data, tmp_path, lambda file, name: name in kinds) >= 14


ALL: dict[str, tuple[str, Damage]] = {
    "tensors": ("*.safetensors", flip(0.5)),
    "manifests": ("manifest.json", cut(0.5)),
    "no manifest": ("manifest.json", remove),
    "foreign manifests": ("manifest.json", replace(b"{}")),
}


@pytest.mark.parametrize(
    "kind", ["tensors", *(pytest.param(kind, marks=pytest.mark.long) for kind in list(ALL)[1:])]
)
def test_all_damaged_is_status_4(kind: str, finished: Finished, data: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("one"), run)
    pattern, damage = ALL[kind]
    for path in (run / "checkpoints").glob(f"step-*/{pattern}"):
        damage(path)
    metrics = (run / "metrics.jsonl").read_bytes()
    kept = content(run)
    ended = train(run, **LAYOUTS["one"], DATA_FILE_LIST=data)
    assert ended.status == 4, ended.output
    for step in (4, 8, 12):
        assert f"step-{step:08d}" in ended.output, ended.output
    assert (run / "metrics.jsonl").read_bytes() == metrics
    assert content(run) == kept, "a damaged checkpoint was changed or deleted"


def content(run: Path) -> list[str]:
    """Digests of all files of all steps, wherever they were moved."""
    return sorted(
        digest for name, digest in digests(run / "checkpoints").items() if name.startswith("step-")
    )


@pytest.mark.long
def test_latest_is_a_hint_only(finished: Finished, data: str, tmp_path: Path) -> None:
    """Nothing is read from `latest`, and a `latest` that cannot be written fails no save."""
    run = tmp_path / "run"
    shutil.copytree(finished("one"), run)
    for name in ("latest", "latest_checkpointed_iteration.txt"):
        (run / "checkpoints" / name).unlink()
        (run / "checkpoints" / name).mkdir()
    ended = train(run, **LAYOUTS["one"], DATA_FILE_LIST=data, TRAIN_ITERS="16")
    assert ended.status == 0, ended.output
    assert committed(run) == [4, 8, 12, 16]
    assert "was not saved" not in ended.output


@pytest.mark.long
def test_a_manifest_of_another_step_is_damage(
    finished: Finished, data: str, tmp_path: Path
) -> None:
    """A sound folder under another step's name: its manifest says which step it is."""
    run = tmp_path / "run"
    shutil.copytree(finished("one"), run)
    shutil.rmtree(step_folder(run, 12))
    shutil.copytree(step_folder(run, 4), step_folder(run, 12))
    ended = train(run, **LAYOUTS["one"], DATA_FILE_LIST=data)
    assert ended.status == 0, ended.output
    assert tensor_digests(run, 12) == tensor_digests(finished("one"), 12)
    assert steps(run) == list(range(1, STEPS + 1))


def test_the_cases_see_what_they_change(finished: Finished) -> None:
    """Each damage changes the file, and leaves JSON where it says so."""
    step = step_folder(finished("one"), STEPS)
    files = {file for file, _, _ in damages(step, random.Random(8))}
    assert files == {path.name for path in step.iterdir()}

"""A run goes on in another layout: the losses it would have had, each sample exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.conftest import Finished
from tests.faults.harness import LAYOUTS, each, losses, train

CHANGE, STEPS, BATCH = 6, 12, 8
PAIRS = [
    ("one", "tp2"), ("tp2", "pp2"), ("pp2", "zero3"), ("zero3", "tp2-pp2"), ("tp2-pp2", "dp4"),
    ("dp4", "one"), ("dp2", "tp2"), ("tp2-dp2", "pp2"), ("pp2", "one"), ("one", "zero3"),
    ("zero3", "dp2"), ("dp2", "tp2-pp2"),
]  # fmt: skip
QUICK = [("tp2", "pp2")]
COPIES = {"tp2": 2, "pp2": 2, "tp2-pp2": 4, "tp2-dp2": 2}
"""Ranks that are fed each sample: those of a tensor-parallel group, first and last stage."""


def fed(folder: Path) -> dict[int, Counter[str]]:
    """Step -> checksums of the samples that all ranks were fed, with their number."""
    found: dict[int, Counter[str]] = {}
    for path in folder.glob("fed-*.txt"):
        for line in path.read_text().splitlines():
            step, *rows = line.split()
            found.setdefault(int(step), Counter()).update(rows)
    return found


def changed(before: str, after: str, root: Path, data: str, whole: Path) -> str:
    """Six steps in a layout, six in another; returns what differs from one never stopped."""
    folder = root / f"{before}-{after}"
    for layout, last in ((before, CHANGE), (after, STEPS)):
        settings = {"TRAIN_ITERS": str(last), "DATA_FILE_LIST": data, **LAYOUTS[layout]}
        batch = int(settings["WORLD_SIZE"]) // COPIES.get(layout, 1)
        ended = train(folder, hooks=["note_batches"], **settings, **sizes(batch))
        assert ended.status == 0, f"{layout}: {ended.output}"
    expected, found = losses(whole), losses(folder)
    assert sorted(found) == list(range(1, STEPS + 1))
    worst = max(abs(found[step] - expected[step]) for step in range(CHANGE + 1, CHANGE + 6))
    assert worst <= 1e-5, f"losses differ by {worst:.2g}"
    samples, reference = fed(folder), fed(whole)
    for step in range(1, STEPS + 1):
        copies = COPIES.get(before if step <= CHANGE else after, 1)
        wanted = Counter({row: copies * count for row, count in reference[step].items()})
        assert samples[step] == wanted, f"step {step} saw other samples"
    return ""


def sizes(data_parallel: int) -> dict[str, str]:
    """Micro-batch of a layout; the global batch is the same."""
    return {"MICRO_BATCH": str(min(2, BATCH // data_parallel)), "GLOBAL_BATCH": str(BATCH)}


def whole_run(root: Path, data: str) -> Path:
    """One process that never stopped."""
    ended = train(root / "whole", hooks=["note_batches"], DATA_FILE_LIST=data, **LAYOUTS["one"])
    assert ended.status == 0, ended.output
    rows = sum(fed(root / "whole").values(), Counter())
    assert rows.total() == STEPS * BATCH
    return root / "whole"


def test_a_layout_is_changed(data: str, tmp_path: Path) -> None:
    whole = whole_run(tmp_path, data)
    each(lambda pair: changed(*pair, tmp_path, data, whole), QUICK)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twelve_pairs(data: str, tmp_path: Path) -> None:
    assert len(PAIRS) == 12
    whole = whole_run(tmp_path, data)
    each(lambda pair: changed(*pair, tmp_path, data, whole), PAIRS)


@pytest.mark.long
def test_the_same_layout_gives_the_same_bits(finished: Finished, data: str, tmp_path: Path) -> None:
    """What the pairs are held against is itself what a resume repeats."""
    settings = {"DATA_FILE_LIST": data, **LAYOUTS["one"]}
    assert train(tmp_path / "run", TRAIN_ITERS="6", **settings).status == 0
    assert train(tmp_path / "run", **settings).status == 0
    assert losses(tmp_path / "run") == losses(finished("one"))

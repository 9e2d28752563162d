"""The drawings of docs/: current, small, self-contained, and true."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.pictures import draw
from tests.pictures.ring import all_reduce
from tests.pictures.schedule import ORDERS, bubble, in_flight, play


@pytest.mark.parametrize("name", draw.DRAWINGS)
def test_a_drawing_is_the_committed_one_and_asks_for_nothing(name: str) -> None:
    text = draw.DRAWINGS[name]()
    committed = (draw.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert text == committed, "python3 -m tests.pictures.draw makes docs/pictures anew"
    assert len(text) < 60_000 and text.isascii()
    root = ElementTree.fromstring(text)
    assert not re.findall(r"(?:href|src)=|url\((?!#)|@import", text)
    words = root.iter("{http://www.w3.org/2000/svg}text")
    # A letter is 0.6 of its size wide at most: none runs out of the drawing.
    for word in words:
        x, size = float(word.get("x", 0)), float(word.get("font-size", 0))
        wide = 0.56 * size * len(word.text or "")
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[word.get("text-anchor", "")]
        assert left >= 0 and left + wide <= float(root.get("width", 0)), word.text


def test_no_drawing_is_left_over() -> None:
    assert {path.stem for path in draw.FOLDER.iterdir()} == set(draw.DRAWINGS)


@pytest.mark.parametrize("ranks", range(2, 7))
def test_the_ring_sums_everything_in_as_many_steps_as_it_says(ranks: int) -> None:
    states = all_reduce(ranks)
    everyone = frozenset(range(ranks))
    assert len(states) == 1 + 2 * (ranks - 1)
    assert all(chunk == everyone for row in states[-1] for chunk in row)
    assert not all(chunk == everyone for row in states[-2] for chunk in row)
    halfway = states[ranks - 1]  # each rank has one chunk summed
    assert all(sum(chunk == everyone for chunk in row) == 1 for row in halfway)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 5), (4, 2), (4, 8), (6, 12)])
def test_a_schedule_has_the_bubble_of_the_formula(
    name: str, stages: int, micro_batches: int
) -> None:
    works = play(name, stages, micro_batches)
    assert len(works) == 2 * stages * micro_batches
    expected = (stages - 1) / (micro_batches + stages - 1)
    assert bubble(works, stages) == pytest.approx(expected)
    held = [in_flight(works, stage) for stage in range(stages)]
    behind = [min(stages - stage, micro_batches) for stage in range(stages)]
    assert held == (behind if name == "1F1B" else [micro_batches] * stages)

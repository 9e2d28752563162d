"""Pictures: which there are, that none loses a spike, and that none asks for anything."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.analysis.panels import PANELS, Painter, metric_panel, smoothed, thinned
from megatron.analysis.recorded_run import RecordedRun, read_folder
from tests.analysis import run_folder
from tests.training import records_factory as make

CURVES = st.lists(st.floats(-1e6, 1e6), max_size=400).map(
    lambda ys: [(float(x), y) for x, y in enumerate(ys)]
)


@given(curve=CURVES, most=st.integers(4, 100))
def test_a_thinned_curve_keeps_its_extremes(curve: list[tuple[float, float]], most: int) -> None:
    kept = thinned(curve, most)
    assert len(kept) <= most and set(kept) <= set(curve) and kept == sorted(kept)
    if curve:
        for extreme in (min, max):
            assert extreme(y for _, y in kept) == extreme(y for _, y in curve)


@given(curve=CURVES)
def test_a_smoothed_curve_stays_within_it(curve: list[tuple[float, float]]) -> None:
    means = smoothed(curve)
    assert [x for x, _ in means] == [x for x, _ in curve]
    ys = [y for _, y in curve]
    assert all(min(ys) - 1e-3 <= y <= max(ys) + 1e-3 for _, y in means)


def test_every_panel_with_something_to_show_is_a_self_contained_svg(tmp_path: Path) -> None:
    drawn = Painter([read_folder(run_folder.write(tmp_path / "run"))]).svgs()
    assert list(drawn) == ["loss", "grad_norm", "learning_rate", "throughput", "memory",
                           "step_time", "phases", "corpus_loss", "accuracy"]  # fmt: skip
    for text in drawn.values():
        ElementTree.fromstring(text)
        assert "currentColor" in text and "#010203" not in text
        assert not re.findall(r'(?:href|src)="(?!#)|url\((?!#)|@import|font-family', text)
        assert len(text) < 150_000
    assert all(word in drawn["loss"] for word in ("training", "validation", "spike", "skipped"))
    assert "forward-backward" not in drawn["phases"] and "backward" in drawn["phases"]
    assert "prose &amp; &lt;verse&gt;" in drawn["corpus_loss"]


def test_phases_add_up_to_the_step(tmp_path: Path) -> None:
    run = read_folder(run_folder.write(tmp_path / "run"))
    curves = PANELS["phases"].curves(run)
    seconds = dict(PANELS["step_time"].curves(run)[""])
    for x, whole in seconds.items():
        assert math.fsum(dict(curve)[x] for curve in curves.values()) == pytest.approx(whole)


def test_several_runs_share_their_pictures(tmp_path: Path) -> None:
    runs = [read_folder(run_folder.write(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    drawn = Painter(runs).svgs()
    assert "tflops" in drawn
    for name in ("loss", "grad_norm", "throughput"):
        assert ">a<" in drawn[name] and ">b<" in drawn[name]


def test_long_names_leave_room_for_the_curves(tmp_path: Path) -> None:
    names = [f"llama3-3B-nLayers12-seq8192-dolma-with-a-long-name-{n}" for n in "ab"]
    runs = [read_folder(run_folder.write(tmp_path / name)) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = Painter(runs).svgs()
    assert "with-a-long-name-b<" in drawn["phases"] and names[0] not in drawn["loss"]


def test_a_run_of_one_step_or_of_none_can_be_drawn() -> None:
    one = RecordedRun("one", {}, {}, [make.step(1, corpus_loss={"code": 1.0}), make.evaluation(1)])
    assert "loss" in Painter([one]).svgs()
    assert Painter([RecordedRun("none", {}, {}, [make.skip(1)])]).svgs() == {}


def test_a_million_steps_are_a_small_picture(tmp_path: Path) -> None:
    curve = [(float(x), math.sin(x)) for x in range(200_000)]
    assert len(thinned(curve)) <= 1200
    steps = [make.step(i, 5 + math.sin(i)) for i in range(1, 20_000)]
    assert len(Painter([RecordedRun("long", {}, {}, steps)]).svgs()["loss"]) < 150_000


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_metric_is_saved_as_a_file(tmp_path: Path, ending: str, begins: bytes) -> None:
    run = RecordedRun("run", {}, {}, [make.step(1), make.step(2), make.evaluation(2)])
    path = tmp_path / f"x.{ending}"
    for metric in ("loss", "grad_norm", "validation"):
        assert Painter([run]).save(path, metric_panel(metric))
        assert path.read_bytes().startswith(begins)
    assert not Painter([run]).save(path, metric_panel("mfu"))


def test_matplotlib_is_imported_when_it_draws() -> None:
    script = (
        "import sys, megatron.analysis.report_page\nraise SystemExit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0

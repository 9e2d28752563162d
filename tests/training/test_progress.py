"""The time left, with a clock that the test turns."""

from __future__ import annotations

from megatron.training.progress import Progress


def test_the_rest_is_estimated_from_the_steps_after_the_first() -> None:
    now = [1000.0]
    progress = Progress(every=30.0, clock=lambda: now[0])
    assert progress.line(11, 100) is None
    lines = {}
    for iteration in range(12, 101):
        now[0] += 10.0
        lines[iteration] = progress.line(iteration, 100)
    said = {iteration: text for iteration, text in lines.items() if text is not None}
    assert list(said)[:3] == [14, 17, 20]
    assert said[14] == "progress=14.0% | steps_left=86 | time_left=0:14:20"
    assert 100 not in said


def test_long_rests_are_shown_in_days() -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    progress.line(1, 10**6)
    now[0] = 60.0
    assert (
        progress.line(2, 10**6)
        == "progress=0.0% | steps_left=999998 | time_left=694 days, 10:38:00"
    )

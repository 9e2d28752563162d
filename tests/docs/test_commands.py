"""Every command that README.md and docs/ show works: it is run here, or by a test that is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.docs.commands import GENERATED, PAGES, ROOT, Shown, shown
from tests.docs.covered import BY_HAND, COVERED
from tests.e2e.front_door import environment
from tests.seeds.typed import typed

COMMANDS = [command for page in PAGES if page != GENERATED for command in shown(page)]
LESSONS = {("README.md", "Quick tour"), ("docs/hands-on.md", ""), ("docs/workshop.md", "")}
"""Pages, or parts under a heading, whose commands are run in order as they stand."""

SMALL = {
    "NLAYERS": "2", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "4", "FFN_HIDDEN_SIZE": "48",
    "SEQ": "32", "DTYPE": "fp32", "MICRO_BATCH": "2", "TRAIN_ITERS": "4", "EVAL_INTERVAL": "2",
    "EVAL_ITERS": "1", "WANDB_MODE": "disabled", "NO_TENSORBOARD": "1", "LR_WARMUP_FRAC": "0",
}  # fmt: skip
"""What a command does not set itself."""

TEXT = (
    "ROMEO:\nTo be, or not to be, that is the question:\n"
    "Whether 'tis nobler in the mind to suffer\n"
)


def in_a_lesson(command: Shown) -> bool:
    """Whether a lesson runs it."""
    return bool({(command.page, command.heading), (command.page, "")} & LESSONS)


def covering(command: Shown) -> str | None:
    """The test that runs it, by the longest beginning that COVERED has."""
    found = [start for start in COVERED if command.text.startswith(start)]
    return COVERED[max(found, key=len)] if found else None


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40
    assert {page for page, _ in LESSONS} <= {command.page for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda shown: f"{shown.page}: {shown.text}"[:70])
def test_something_runs_it(command: Shown) -> None:
    by_hand = command.text.startswith(tuple(BY_HAND))
    assert by_hand or command.trains or in_a_lesson(command) or covering(command), (
        f"{command.page} shows `{command.text}`, which no test runs: put it into a lesson, or its "
        "beginning and the test that runs it into tests/docs/covered.py"
    )


def test_the_tests_that_are_named_exist_and_nothing_is_left_over() -> None:
    begun = [start for command in COMMANDS for start in COVERED if command.text.startswith(start)]
    assert set(begun) == COVERED.keys(), "no page shows them"
    for test in COVERED.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


RESOLVED = [
    command
    for command in COMMANDS
    if command.trains and not in_a_lesson(command) and covering(command) is None
]


@pytest.mark.parametrize("command", RESOLVED, ids=lambda shown: f"{shown.page}: {shown.text}"[:70])
def test_settings_of_a_training_command_are_accepted(
    command: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a dry run on a laptop; a list that it reads need not be there."""
    monkeypatch.chdir(tmp_path)
    found = typed(command.text, "laptop", 1, tmp_path).resolved()
    assert not [line for line in found.warnings if "has no effect: the" in line]


@pytest.mark.parametrize("page", PAGES)
def test_pictures_of_the_pages_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [name for name in named if not (ROOT / page).parent.joinpath(name).is_file()] == []
    assert len(named) == (6 if page == "docs/workshop.md" else len(named))


def sandbox(folder: Path) -> Path:
    """A checkout of links, so that runs and texts of a lesson stay in it."""
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".git", ".venv"):
            (folder / entry.name).symlink_to(entry)
    (folder / "book.txt").write_text(TEXT * 400)
    (folder / "tinyshakespeare.txt").write_text(TEXT * 400)
    return folder


def shortened(text: str) -> str:
    """The command with a fiftieth of its steps."""
    return re.sub(r"\bTRAIN_ITERS=(\d+)", lambda n: f"TRAIN_ITERS={max(4, int(n[1]) // 50)}", text)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("page", "heading"), sorted(LESSONS))
def test_a_lesson(page: str, heading: str, tmp_path: Path) -> None:
    """All commands of a lesson in order, each with status 0, on small sizes."""
    folder = sandbox(tmp_path)
    for command in shown(page):
        if heading and command.heading != heading:
            continue
        result = subprocess.run(
            ["bash", "-c", shortened(command.text)], cwd=folder, env=environment(SMALL),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=240,
        )  # fmt: skip
        assert result.returncode == 0, f"$ {command.text}\n{result.stdout[-4000:]}"

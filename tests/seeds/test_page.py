"""docs/seeds.md is what the rows and commands say, and each claim has a test."""

from __future__ import annotations

from pathlib import Path

from tests.seeds.commands import ELSEWHERE
from tests.seeds.page import PAGE, page
from tests.seeds.rows import NOT_YET, VERDICTS, WORKS, rows

TESTS = Path(__file__).resolve().parents[1]


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python3 -m tests.seeds.page"


def test_what_works_is_shown_by_a_test() -> None:
    for row in rows():
        assert row.verdict in VERDICTS, row
        assert row.test or row.verdict != WORKS, row
    for test in [*(row.test for row in rows()), *(test for *_, test in ELSEWHERE)]:
        if test:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), test


def test_the_five_documents_have_all_their_things() -> None:
    assert len(rows()) == 117
    assert sum(row.verdict == NOT_YET for row in rows()) <= 9  # it only falls

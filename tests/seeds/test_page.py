"""docs/seeds.md is what the rows and commands say, and each claim has a test."""

from __future__ import annotations

from pathlib import Path

from tests.seeds.page import PAGE, page
from tests.seeds.rows import NOT_YET, VERDICTS, WORKS, rows

TESTS = Path(__file__).resolve().parents[1]


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python3 -m tests.seeds.page"


def test_what_works_is_shown_by_a_test() -> None:
    for row in rows():
        assert row.verdict in VERDICTS, row
        assert row.test or row.verdict != WORKS, row
        if row.test:
            file, _, name = row.test.partition("::")
            assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), row


def test_the_five_documents_have_all_their_things() -> None:
    assert len(rows()) == 117
    assert sum(row.verdict == NOT_YET for row in rows()) <= 25  # it only falls

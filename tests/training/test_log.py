"""The prefix of every message and who prints what."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from megatron.training import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    logger = logging.getLogger(log.ROOT)
    former = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = former


def test_the_prefix_of_a_training_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, "INFO")
    logging.getLogger(log.TRAINING_LOG).info("iteration=1")
    printed = capsys.readouterr().out
    moment = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\]"
    assert re.fullmatch(moment + r"\[INFO\]\[training_log\] - iteration=1\n", printed)


def test_the_module_is_the_last_part_of_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, "INFO")
    logging.getLogger("megatron.data.blend").info("x")
    assert "[INFO][blend] - x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rank", "level", "expected"),
    [
        (0, "DEBUG", "DIWE"),
        (0, "INFO", "IWE"),
        (0, "ERROR", "E"),
        (3, "DEBUG", "WE"),
        (3, "INFO", "WE"),
        (3, "ERROR", "E"),
    ],
)
def test_only_rank_0_prints_below_warning(
    rank: int, level: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.setup(rank, level)
    logger = logging.getLogger("megatron.x")
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("message")
    lines = capsys.readouterr().out.splitlines()
    assert "".join(line.split("][")[1][0] for line in lines) == expected
    assert all(("[rank 3] - message" in line) == (rank == 3) for line in lines)


def test_every_rank_logs_where_it_is_asked_to(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(3, "INFO", all_ranks=True)
    logger = logging.getLogger("megatron.x")
    logger.debug("message")
    logger.info("message")
    logger.warning("message", extra=log.ALIKE)  # which rank 0 would print for all
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^\[[^]]*\]", "", line) for line in lines] == [
        "[INFO][x][rank 3] - message", "[WARNING][x][rank 3] - message",
    ]  # fmt: skip


def test_a_second_set_up_does_not_print_twice(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, "INFO")
    log.setup(0, "INFO")
    logging.getLogger("megatron.x").info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_a_traceback_follows(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0, "INFO")
    try:
        raise ValueError("inner")
    except ValueError:
        logging.getLogger("megatron.x").exception("outer")
    printed = capsys.readouterr().out
    assert "- outer\nTraceback" in printed
    assert printed.endswith("ValueError: inner\n")


def test_what_all_ranks_say_alike_is_printed_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        log.setup(rank, "INFO")
        logging.getLogger("megatron.x").warning("of all", extra=log.ALIKE)
        logging.getLogger("megatron.x").warning("my own")
    printed = capsys.readouterr().out
    assert printed.count("of all") == 1 and printed.count("my own") == 2

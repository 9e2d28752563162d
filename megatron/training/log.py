"""One rank-aware logger: `[date time][LEVEL][module] - message` on standard output.

Rank 0 prints everything from the chosen level on, the others only warnings and worse, with their
rank; with LOG_FROM_ALL_RANKS all ranks print alike. Modules ask for `logging.getLogger(__name__)`;
the line of training steps comes from the name `training_log`.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime

from megatron.display.marked_line import marked

ROOT = "megatron"
TRAINING_LOG = f"{ROOT}.training_log"

ALIKE = {"alike": True}
"""`extra` of a record that all ranks make alike: rank 0 prints it for them."""


class PrefixFormatter(logging.Formatter):
    """Prefix of a message; `module` is the last part of the logger's name.

    Args:
        rank: global rank.
        marks: a launcher wants the records of lines that are made from one.
    """

    def __init__(self, rank: int, *, marks: bool = False) -> None:
        super().__init__()
        self._rank = "" if rank == 0 else f"[rank {rank}]"
        self._marks = marks

    def format(self, record: logging.LogRecord) -> str:
        """The prefixed message; a traceback follows on lines of its own."""
        moment = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S.%f")
        module = record.name.rpartition(".")[2]
        text = f"[{moment}][{record.levelname}][{module}]{self._rank} - {record.getMessage()}"
        if self._marks and (made_from := getattr(record, "made_from", None)) is not None:
            return marked(text, made_from)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def setup(rank: int, level: str, *, marks: bool = False, all_ranks: bool = False) -> None:
    """Configures the project's logger of this process; a second call replaces the first.

    Args:
        rank: global rank.
        level: DEBUG, INFO, WARNING or ERROR: lowest level rank 0 prints.
        marks: as of `PrefixFormatter`.
        all_ranks: the other ranks print what rank 0 does.
    """
    # Not at import, so that a redirected standard output is used.
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrefixFormatter(rank, marks=marks))
    handler.addFilter(lambda record: rank == 0 or all_ranks or not getattr(record, "alike", False))
    logger = logging.getLogger(ROOT)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)
    if rank != 0 and not all_ranks:
        logger.setLevel(max(logger.level, logging.WARNING))

"""Errors that keep a run from starting, each with the exit status of the command."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is wrong: the message names the variable, shows the arithmetic and gives a fix."""

    exit_status = 2


class DataError(ValueError):
    """Data is wrong: the message names the file, what was found and gives a fix."""

    exit_status = 3


class MissingCheckpoint(RuntimeError):
    """No usable checkpoint where one was required."""

    exit_status = 4

"""What is raised when a run cannot start, with the exit status that the command then has."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is wrong: the message names the variable, shows the arithmetic and gives a fix."""

    exit_status = 2


class DataError(ValueError):
    """Data is wrong: the message names the file, what was found and gives a fix."""

    exit_status = 3

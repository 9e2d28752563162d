"""The command line: the schema's flags, and those of the reference that it has a class for."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron.config import schema
from megatron.config.errors import ConfigError
from megatron.config.foreign_variables import FOREIGN_SPELLINGS
from megatron.config.option import Option
from megatron.config.reference_flags import (
    ALWAYS,
    ALWAYS_VALUED,
    ONLY,
    OUTSIDE,
    REFUSED,
    RENAMED,
    SHORTHANDS,
)

# Flags that take the values up to the next flag.
MANY = (
    "--train-range-to-skip", "--rampup-batch-size",
    "--profile-steps", "--profile_steps", "--profile-ranks",
)  # fmt: skip

SPLIT = "--split"  # three shares in one

CLOSE = 0.85  # one letter added, removed or changed in a word of seven


@dataclass
class CommandLine:
    """What a command line set: (option key, text, flag as written) in order, and notes to print."""

    settings: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read `--flag value`, `--flag=value` and bare flags; problems are gathered, not raised."""
    line, left = CommandLine(), list(argv)
    while left:
        flag, equals, attached = left.pop(0).partition("=")
        most = 0 if equals else _most_values(flag)
        values = list(itertools.takewhile(_is_value, left[:most]))
        del left[: len(values)]
        try:
            _read_flag(line, flag, [attached] if equals else values)
        except ConfigError as error:
            line.problems.append(str(error))
    return line


def _is_value(word: str) -> bool:
    """Whether a word can be a flag's value; `-1` and `-1e-3` can."""
    return not word.startswith("--") and word != "-h"


def _most_values(flag: str) -> int | None:
    """Most words after a flag that are its values; None: all up to the next flag."""
    option = schema.by_flag().get(flag)
    if option is not None and flag not in MANY:
        return int(option.kind != "bool")
    if flag in SHORTHANDS or flag in ALWAYS or not flag.startswith("--"):
        return 0
    valued = flag in ONLY or flag in RENAMED or flag in ALWAYS_VALUED or flag == SPLIT
    return 1 if valued else None


def _read_flag(line: CommandLine, flag: str, values: Sequence[str]) -> None:
    """Add one flag with its values to `line`."""
    option = schema.by_flag().get(flag)
    if flag in ("-h", "--help"):
        return  # start.py has printed it
    if option is not None:
        line.settings.append((option.key, _value(flag, option, values), flag))
    elif flag in SHORTHANDS or flag in ALWAYS:
        if values:
            raise ConfigError(f"{flag} takes no value")
        if flag in ALWAYS:
            line.notes.append(f"{flag} changes nothing: {ALWAYS[flag]}")
        else:
            line.settings.append((*SHORTHANDS[flag], flag))
    elif flag in ALWAYS_VALUED:
        line.notes.append(f"{' '.join((flag, *values))} changes nothing: {ALWAYS_VALUED[flag]}")
    elif flag in RENAMED:
        key, note = RENAMED[flag]
        line.settings.append((key, _required(flag, values), flag))
        line.notes.append(f"{flag} is {schema.by_key()[key].flags[0]}: {note}")
    elif flag == SPLIT:
        line.settings += _split_shares(_required(flag, values))
    elif flag in ONLY:
        if _required(flag, values) not in ONLY[flag]:
            raise ConfigError(
                f"{flag} {values[0]} is not offered: only {flag} {ONLY[flag][0]} is supported"
            )
        line.notes.append(f"{flag} {values[0]} changes nothing: it is the only value")
    else:
        raise ConfigError(why_refused(flag))


def _value(flag: str, option: Option, values: Sequence[str]) -> str:
    """The text of an option's value."""
    if option.kind == "bool":
        return values[0] if values else "1"
    return " ".join((_required(flag, values), *values[1:]))


def _required(flag: str, values: Sequence[str]) -> str:
    """The first value of a flag that needs one."""
    if values and values[0].strip():
        return values[0]
    if flag in MANY:
        raise ConfigError(f"{flag} needs values, e.g. {flag} 10 20 25 30")
    raise ConfigError(f"{flag} needs a value: {flag} VALUE or {flag}=VALUE")


def why_refused(flag: str) -> str:
    """Why a flag is no option, with what to do instead where that is known."""
    if not flag.startswith("--"):
        return f"{flag!r} is not a flag: flags start with --, variables go before the command"
    if flag in REFUSED:
        return f"{flag} is not offered: {REFUSED[flag]}"
    if flag in OUTSIDE:
        return f"{flag} is not for this program: {OUTSIDE[flag]}"
    variable = flag[2:].replace("-", "_").upper()
    meant = schema.by_variable().get(FOREIGN_SPELLINGS.get(variable, variable))
    close = meant.flags[0] if meant else _closest(flag)
    return f"{flag} is not a flag of this command. " + (
        f"Did you mean {close}?" if close else "--help lists them."
    )


def _closest(flag: str) -> str | None:
    """The flag that works and that `flag` probably misspells, if any: a slip, not a likeness."""
    working = {*schema.by_flag(), *SHORTHANDS, *ALWAYS, *ALWAYS_VALUED, *ONLY, *RENAMED, SPLIT}
    working -= {"--local-rank"}  # nobody types it: launchers give it
    close = difflib.get_close_matches(flag.replace("_", "-"), sorted(working), n=1, cutoff=CLOSE)
    return close[0] if close else None


def _split_shares(text: str) -> list[tuple[str, str, str]]:
    """`--split 990,10,0`: shares for training, validation and testing."""
    parts = text.replace("/", ",").split(",")
    if len(parts) != 3:
        raise ConfigError(
            f"--split {text}: needs three shares, train,valid,test, e.g. --split 990,10,0"
        )
    keys = ("data.train_split", "data.valid_split", "data.test_split")
    return [(key, part, SPLIT) for key, part in zip(keys, parts, strict=True)]

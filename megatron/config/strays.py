"""Variables that look like options and are none: what holds, and whether a job is refused."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.config import schema
from megatron.config.errors import ConfigError
from megatron.config.foreign_variables import (
    FOREIGN_SPELLINGS,
    NOT_OURS,
    NOT_OURS_PREFIXES,
    SWITCHES,
    WITHOUT_EFFECT,
)
from megatron.config.reference_flags import (
    ALWAYS,
    ALWAYS_VALUED,
    ONLY,
    OUTSIDE,
    REFUSED,
    RENAMED,
    SHORTHANDS,
)

CLOSE = 0.85  # one letter added, removed or changed in a word of seven
SHORTEST = 5  # shorter names resemble too much


class Stray(NamedTuple):
    """A variable that looks like an option and is none.

    Attributes:
        text: what holds.
        in_vain: the user meant an option by it: a job with it is refused.
    """

    name: str
    text: str
    in_vain: bool


def found(environ: Mapping[str, str], ignored: str | None = None) -> list[Stray]:
    """Variables that are set, look like options and are none, by name.

    Args:
        environ: the environment's variables.
        ignored: IGNORE_VARIABLES, names that are meant for something else.
    """
    meant_otherwise = {*(ignored or "").replace(",", " ").split()}
    strays: list[Stray] = []
    for name in sorted(environ):
        ours = any(
            name in names for names in (schema.by_variable(), SWITCHES, NOT_OURS, meant_otherwise)
        )
        if not ours and environ[name].strip():
            stray = _stray(name, environ[name])
            strays += [stray] if stray else []
    return strays


def require_none(strays: Sequence[Stray]) -> None:
    """Refuse variables that were meant as options: nobody reads a job's warnings in time.

    Raises:
        ConfigError: where there are any.
    """
    vain = [stray for stray in strays if stray.in_vain]
    if vain:
        names = ",".join(stray.name for stray in vain)
        lines = [stray.text for stray in vain]
        lines.append(f"A job with them is refused: unset them, or set IGNORE_VARIABLES={names}")
        raise ConfigError("\n".join(lines))


def _stray(name: str, value: str) -> Stray | None:
    """What holds for a variable that is none of ours; None for one that resembles none."""
    if name in WITHOUT_EFFECT:
        return Stray(name, f"{name} has no effect here: {WITHOUT_EFFECT[name]}", False)
    meant = FOREIGN_SPELLINGS.get(name) or _flag_spellings().get(name)
    reference = None if meant else _reference_spellings().get(name)
    if reference:
        return Stray(name, f"{name}={value} has no effect: {reference[0]}", reference[1])
    meant = meant or _closest(name)
    if not meant:
        return None
    kind = "flag" if meant.startswith("--") else "variable"
    return Stray(name, f"{name}={value} has no effect: the {kind} is called {meant}", True)


@functools.cache
def _flag_spellings() -> dict[str, str]:
    """Flags written as variables, e.g. HIDDEN_SIZE for --hidden-size, and what they are called."""
    others = {**SHORTHANDS, **RENAMED}
    shorthands = {flag: schema.by_key()[key] for flag, (key, _) in others.items()}
    return {
        _as_variable(flag): option.env[0] if option.env else flag
        for flag, option in (shorthands | schema.by_flag()).items()
    }


@functools.cache
def _reference_spellings() -> dict[str, tuple[str, bool]]:
    """The reference's flags written as variables: what holds, and whether that matters."""
    noted = {**ALWAYS, **ALWAYS_VALUED, **{flag: f"only {v[0]} works" for flag, v in ONLY.items()}}
    refused = {flag: f"{flag} is not offered: {what}" for flag, what in REFUSED.items()}
    outside = {flag: f"{flag} is not for this program: {what}" for flag, what in OUTSIDE.items()}
    classes = ((noted, False), (outside, False), (refused, True))
    return {
        _as_variable(flag): (text, matters)
        for texts, matters in classes
        for flag, text in texts.items()
        if len(_as_variable(flag)) >= SHORTEST
    }


def _as_variable(flag: str) -> str:
    return flag[2:].replace("-", "_").upper()


def _closest(name: str) -> str | None:
    """The variable that `name` probably misspells, if any."""
    if len(name) < SHORTEST or not name.isupper() or name.startswith(NOT_OURS_PREFIXES):
        return None
    close = difflib.get_close_matches(name, schema.by_variable(), n=1, cutoff=CLOSE)
    return close[0] if close else None

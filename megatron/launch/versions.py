"""Versions of torch and DeepSpeed that a run was tested with: their one home.

setup.py executes this file by itself, so it imports nothing of ours.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple


class Range(NamedTuple):
    """Versions, both ends included.

    Attributes:
        oldest: an older one lacks what a run needs, or computes something else.
        newest: tested; a newer one may work.
        why: what is missing before `oldest`.
    """

    oldest: str
    newest: str
    why: str


TESTED = {
    "torch": Range("2.11", "2.15", "torch.distributed and attention kernels as they are used here"),
    "deepspeed": Range(
        "0.19.3", "0.19.8", "before it, gradients under pipeline parallelism have a wrong scale"
    ),
}


SINCE = {"dualpipev": ("deepspeed", "0.19.8")}
"""What not all tested versions have -> package and the first version that has it."""


def lacking(feature: str, found: Mapping[str, str | None]) -> str:
    """Why these versions cannot do `feature`; empty where they can."""
    package, first = SINCE[feature]
    version = found[package]
    if version is None or numbers(version) >= numbers(first):
        return ""
    return f"needs {package} {first} or later, and this is {version}"


def requirement(name: str) -> str:
    """The tested versions as pip wants them: `torch>=2.11,<2.16`."""
    *first, last = numbers(TESTED[name].newest)
    return f"{name}>={TESTED[name].oldest},<{'.'.join(map(str, [*first, last + 1]))}"


def numbers(version: str) -> tuple[int, ...]:
    """`0.19.5+cu128` -> (0, 19, 5); what follows the numbers of a release does not count."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def installed() -> dict[str, str | None]:
    """Package -> the version that this interpreter would import; None: it is not there."""
    found: dict[str, str | None] = {}
    for name in TESTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def exit_unless_fit() -> None:
    """Ends the process with status 2 where a package is missing or too old: importing it would fail
    in its own words, or not at all.
    """
    errors, _ = compare(installed())
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        sys.exit(2)


def compare(found: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """What is too old or missing, and what is newer than tested, each with what to do.

    Args:
        found: package -> version, as `installed` has them.
    """
    errors, warnings = [], []
    for name, version in found.items():
        tested = TESTED[name]
        span = f"{tested.oldest} to {tested.newest} are tested"
        fix = (
            f"python3 -m pip install '{name}~={tested.newest}.0', or start outside this "
            f"environment: train_alcf.sh then makes its own"
        )
        if version is None:
            errors.append(f"{name} is not installed ({span}): {fix}")
        elif numbers(version) < numbers(tested.oldest):
            errors.append(f"{name} {version} is too old ({span}; {tested.why}): {fix}")
        elif numbers(version)[: len(numbers(tested.newest))] > numbers(tested.newest):
            warnings.append(
                f"{name} {version} is newer than what is tested ({span}): compare its losses with "
                f"a tested version's, or {fix}"
            )
    return errors, warnings

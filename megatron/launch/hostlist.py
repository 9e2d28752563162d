"""Names of hosts: Slurm's bracket lists, and host files of PBS, Open MPI and DeepSpeed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.config.errors import ConfigError

_ITEM = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")  # up to a comma outside brackets
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand(text: str, name: str = "SLURM_NODELIST") -> tuple[str, ...]:
    """The hosts of a list such as `nid[001-002],nid007,a[1-2]b[3-4]`, in its order.

    Args:
        text: Slurm's notation; digits keep their leading zeros.
        name: the variable it comes from, for messages.

    Raises:
        ConfigError: for any other text.
    """
    text = text.strip()
    items = _ITEM.findall(text)
    if not text or ",".join(items) != text:
        raise ConfigError(f"{name}={text} is not a list of hosts such as nid[001-002],nid007")
    hosts: list[str] = []
    for item in items:
        parts = [
            list(_numbers(inside, name)) if plain == "" else [plain]
            for inside, plain in _PART.findall(item)
        ]
        hosts += ("".join(words) for words in itertools.product(*parts))
    return unique(hosts)


def repeated(text: str, name: str = "SLURM_STEP_TASKS_PER_NODE") -> tuple[int, ...]:
    """The numbers per host of Slurm's lists such as `2(x3),1`: (2, 2, 2, 1).

    Raises:
        ConfigError: for any other text.
    """
    numbers: list[int] = []
    for word in text.split(","):
        match = _REPEATED.fullmatch(word)
        if not match:
            raise ConfigError(f"{name}={text} is not a list of numbers such as 2(x3),1")
        numbers += [int(match[1])] * int(match[2] or 1)
    return tuple(numbers)


def _numbers(text: str, name: str) -> Iterator[str]:
    """`001-003,7` -> 001 002 003 7."""
    for word in text.split(","):
        match = _RANGE.fullmatch(word)
        first, last = match.groups() if match else ("", "")
        if not match or int(last or first) < int(first):
            raise ConfigError(f"{name}: [{text}] is not a range of hosts such as [001-003,7]")
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))


def read_hostfile(path: Path, name: str) -> tuple[str, ...]:
    """The hosts of a host file, each once, in its order.

    A line is `host`, `host slots=4` or `host:4`; `#` starts a comment.

    Args:
        path: the file.
        name: the variable or flag that names it, for messages.

    Raises:
        ConfigError: where it cannot be read or names no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name}={path} cannot be read ({error}): "
            f"give a file with one host per line, or unset {name}"
        ) from None
    words = (line.partition("#")[0].split() for line in lines)
    hosts = unique(word[0].partition(":")[0] for word in words if word)
    if not hosts:
        raise ConfigError(f"{name}={path} names no host: write one host per line, or unset {name}")
    return hosts


def unique(hosts: Iterable[str]) -> tuple[str, ...]:
    """Each host once, in order of its first mention."""
    return tuple(dict.fromkeys(hosts))


def short(host: str) -> str:
    """A host's name without its domain; an address stays whole."""
    return host if re.fullmatch(r"[\d.]+", host) else host.partition(".")[0]

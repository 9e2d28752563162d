"""One option: how a field declares it, how text becomes its value, and values being resolved."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.config import update_rules
from megatron.config.errors import ConfigError

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")

# Other spellings of a choice, as common scripts write them.
SPELLINGS = {
    "train.activation_checkpointing": {
        "true": "1", "yes": "1", "on": "1", "full": "1",
        "false": "0", "no": "0", "off": "0", "none": "0",
    },
    "train.compile": {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0"},
    "train.float8": {
        "true": "1", "yes": "1", "on": "1", "tensorwise": "1", "false": "0", "no": "0", "off": "0",
    },
    "train.dtype": {
        "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
    },
    "optimizer.optimizer": {
        **{name: name for name in update_rules.accepted()},
        **{name: rule for name, (rule, _) in update_rules.KERNELS.items()},
    },
    "optimizer.lr_decay_style": {"wsd": "warmup-stable-decay"},
    "log.profile": {"pt": "torch", "pt-full": "torch", "1": "torch", "0": "off"},
    "log.wandb_mode": {"off": "disabled", "none": "disabled", "on": "online"},
    "data.tokenizer_type": {
        "hf": "HFTokenizer", "sentencepiece": "SentencePieceTokenizer", "byte": "ByteTokenizer",
        "char": "CharTokenizer", "builtin": "BuiltinTokenizer",
    },
    "log.log_level": {name.lower(): name for name in ("DEBUG", "INFO", "WARNING", "ERROR")},
    "launch.launch_with": {"mpich": "mpiexec", "pals": "mpiexec", "openmpi": "mpirun"},
}  # fmt: skip


# What a wrong choice probably means, where no choice is spelled like it.
MEANT = {
    "train.dtype": {"fp8": "bf16, with FP8=1"},
    "launch.device": {"gpu": "cuda or xpu"},
}

# Options that count steps, tokens or samples, which are often written as 10k, 500B or 2T.
COUNTED = frozenset((
    "train.train_iters", "train.train_tokens", "train.train_samples", "optimizer.lr_warmup_tokens",
))  # fmt: skip
POWERS = {"K": "e3", "M": "e6", "B": "e9", "G": "e9", "T": "e12"}


@dataclass(frozen=True)
class Option:
    """One field of the schema.

    Attributes:
        key: `<section>.<field>`.
        kind: "int", "float", "bool" or "str".
        default: the schema's; None where resolve fills it or it is off.
        env: variables, the canonical name first.
        flags: command-line flags, the canonical spelling first.
    """

    key: str
    kind: str
    default: Any
    env: tuple[str, ...]
    flags: tuple[str, ...]
    help: str
    choices: Collection[str]
    limits: dict[str, float | None]

    @property
    def name(self) -> str:
        """Its name in messages where the user did not set it."""
        return self.env[0] if self.env else self.flags[0]

    def parse(self, text: str, name: str) -> Any:
        """The value that `text` stands for.

        Args:
            text: what the user wrote, not empty.
            name: the variable or flag it was written for.

        Raises:
            ConfigError: for a value of the wrong kind, outside the limits or the choices.
        """
        text = text.strip()
        value: Any
        if self.kind == "bool":
            return _boolean(text, name)
        if self.kind == "int":
            value = _integer(_expanded(text) if self.key in COUNTED else text, name)
        elif self.kind == "float":
            value = _number(text, name)
        else:
            value = SPELLINGS.get(self.key, {}).get(text.lower(), text)
            alike = [choice for choice in self.choices if choice.lower() == value.lower()]
            value = alike[0] if len(alike) == 1 else value
        return self.checked(value, name)

    def checked(self, value: Any, name: str) -> Any:
        """`value` where the limits and choices permit it, else ConfigError."""
        if self.kind in ("int", "float"):
            rule = _broken_limit(value, self.limits)
            if rule:
                raise ConfigError(f"{name}={value}: {self.help}; it must be {rule}")
        elif self.choices and value not in self.choices:
            near = self._nearest(str(value).lower())
            meant = f". Did you mean {near}?" if near else ""
            raise ConfigError(f"{name}={value} is not one of {', '.join(self.choices)}{meant}")
        return value

    def _nearest(self, typed: str) -> str | None:
        """What a wrong choice probably means: a beginning or a part of one, or a slip."""
        if typed in MEANT.get(self.key, {}):
            return MEANT[self.key][typed]
        parts = [choice for choice in self.choices if typed in choice.lower()]
        parts.sort(key=lambda choice: not choice.lower().startswith(typed))
        close = difflib.get_close_matches(typed, self.choices, n=1, cutoff=0.5)
        return next(iter(parts + close), None)


def option(
    default: Any,
    env: str,
    flag: str,
    help: str,
    choices: Collection[str] = (),
    *,
    least: float = 0,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """One configuration field.

    A field whose type excludes None has a value after resolve, even where its default is None.

    Args:
        default: value where nothing sets it; None means resolved later or off.
        env: environment variables separated by spaces, the canonical name first; may be empty.
        flag: command-line flags separated by spaces, the canonical spelling first.
        help: one line for `--help` and the README.
        choices: permitted values of a string option, such as a table by name; empty for any.
        least: smallest permitted number.
        above: numbers must exceed this.
        most: largest permitted number.
        below: numbers must stay under this.
    """
    metadata = {
        "env": tuple(env.split()),
        "flags": tuple(flag.split()),
        "help": help,
        "choices": choices,
        "limits": {"least": least, "above": above, "most": most, "below": below},
    }
    return dataclasses.field(default=default, metadata=metadata)


class Setting(NamedTuple):
    """An option's value, and the name under which the user set it, else its canonical one."""

    name: str
    value: Any

    def __str__(self) -> str:
        """`NAME=value` for messages."""
        return f"{self.name}={self.value}"


class Draft:
    """The configuration while it is resolved: values by option key, with the source of each.

    The first to fill a key wins, so fill in order of precedence.
    """

    def __init__(self, options: Mapping[str, Option]) -> None:
        """Start empty; `options` are those of the schema, by key."""
        self.options = options
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.given: dict[str, str] = {}  # key -> the variable or flag that the user set

    def give(self, key: str, value: Any, name: str) -> None:
        """Set the user's value, given under `name`; an earlier one stays."""
        if key not in self.values:
            self.given[key] = name
            self.fill(key, value, name)

    def fill(self, key: str, value: Any, source: str) -> None:
        """Set a value from another source, unless one is set."""
        if value is not None and key not in self.values:
            self.values[key] = value
            self.sources[key] = source

    def replace(self, key: str, value: Any, source: str) -> None:
        """Replace a default with a value derived from what the user set."""
        self.values[key] = value
        self.sources[key] = source

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self.values.get(key)

    def __getitem__(self, key: str) -> Setting:
        """The value with its name, for messages."""
        name = self.given.get(key) or self.options[key].name
        return Setting(name, self.values.get(key))


def _boolean(text: str, name: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ConfigError(f"{name}={text} is neither {'/'.join(TRUE)} nor {'/'.join(FALSE)}")


def _expanded(text: str) -> str:
    """`2T` -> `2e12`, `1.5B` -> `1.5e9`."""
    return f"{text[:-1]}{POWERS[text[-1].upper()]}" if text[-1].upper() in POWERS else text


def _integer(text: str, name: str) -> int:
    """A whole number; `2e12` and `1_000` are whole numbers too."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer() or abs(number) > 2**53:
        digits = text[:-1] if text[-1:] in ("k", "K") else ""
        meant = f": write {int(digits) * 1024} or {digits}000" if digits.isdecimal() else ""
        raise ConfigError(f"{name}={text} is not a whole number{meant}")
    return int(number)


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}={text} is not a number")
    return number


def _broken_limit(value: float, limits: dict[str, float | None]) -> str | None:
    """The first limit that `value` breaks, in words."""
    least, above, most, below = (limits[word] for word in ("least", "above", "most", "below"))
    if above is not None and value <= above:
        return f"above {above:g}"
    if least is not None and value < least:
        return f"at least {least:g}"
    if most is not None and value > most:
        return f"at most {most:g}"
    if below is not None and value >= below:
        return f"below {below:g}"
    return None

"""The options as text: `--help`, and the README's table. Generated from the schema."""

from __future__ import annotations

import textwrap
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config import schema
from megatron.config.option import Option

USAGE = """usage: [VAR=value ...] bash train_alcf.sh [--flag value ...]

A flag overrides its variable, a variable the run of --resume, that the MODEL_ARCH preset, a preset
the machine's default.
DRY_RUN=1 prints the plan and starts nothing."""

MARKS = ("<!-- options:", "<!-- options:end -->")  # around the table in the README


def value_text(value: object, unset: str = "") -> str:
    """A value as a user would write it; `unset` for one that is off or derived."""
    if value is None:
        return unset
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def options_table() -> str:
    """A markdown table of every option: variables, flags, default, meaning."""
    rows = ["| variable | flag | default | meaning |", "|---|---|---|---|"]
    for option in schema.options():
        names = ", ".join(f"`{name}`" for name in option.env)
        spellings = ", ".join(f"`{flag}`" for flag in option.flags)
        default = value_text(option.default)
        meaning = _meaning(option).replace("|", "\\|")
        rows.append(f"| {names} | {spellings} | {default and f'`{default}`'} | {meaning} |")
    return "\n".join(rows) + "\n"


def help_text() -> str:
    """What `--help` prints: the options by section."""
    lines = [USAGE]
    section = ""
    for option in schema.options():
        if option.key.partition(".")[0] != section:
            section = option.key.partition(".")[0]
            lines += ["", f"{section}:"]
        lines.append("  " + "  ".join((*option.env, *option.flags)))
        default = value_text(option.default)
        text = f"{_meaning(option)} (default {default})" if default else _meaning(option)
        lines += textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _meaning(option: Option) -> str:
    """The help line with the permitted values, unless it names them already."""
    unnamed = [choice for choice in option.choices if choice not in option.help]
    return f"{option.help}; one of {', '.join(option.choices)}" if unnamed else option.help


def with_table(page: str) -> str:
    """The page with the current table between its marks."""
    begin = page.index("\n", page.index(MARKS[0])) + 1
    end = page.index(MARKS[1])
    return f"{page[:begin]}\n{options_table()}\n{page[end:]}"


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[2] / "README.md"
    write_atomically(readme, with_table(readme.read_text(encoding="utf-8")))

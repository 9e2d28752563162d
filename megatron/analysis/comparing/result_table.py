"""A table as Markdown, CSV, JSON or a page that needs no other file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from megatron.analysis.comparing.figures import Shown
from megatron.config.errors import ConfigError


@dataclass(frozen=True)
class ResultTable:
    """Figures of runs.

    Attributes:
        heading: a name for each column.
        rows: as many values each.
        notes: what must be known beside the table.
        loud: what is wrong with the figures themselves.
        more: for programs: what is not in the table.
        folded: columns that Markdown says once where all rows have the same.
        unprinted: columns that Markdown leaves out.
    """

    heading: tuple[str, ...]
    rows: Sequence[tuple[Shown, ...]]
    notes: Sequence[str] = ()
    loud: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    folded: Set[str] = frozenset()
    unprinted: Set[str] = frozenset()


def ordered(table: ResultTable, by: str, *, descending: bool) -> ResultTable:
    """The rows by a column: numbers, then texts, then what is not known.

    Raises:
        ConfigError: there is no such column.
    """
    if by not in table.heading:
        raise ConfigError(f"--sort {by}: there is no such column; {', '.join(table.heading)}")
    place = table.heading.index(by)
    known = [row for row in table.rows if row[place] is not None]
    numbers = [row for row in known if not isinstance(row[place], str)]
    texts = [row for row in known if isinstance(row[place], str)]
    for part in (numbers, texts):
        part.sort(key=lambda row: row[place], reverse=descending)  # type: ignore[arg-type,return-value]
    rest = [row for row in table.rows if row[place] is None]
    return replace(table, rows=numbers + texts + rest)


def plain(value: Any) -> Shown:
    """A setting as a value of a table."""
    return value if value is None or isinstance(value, float | int | str) else str(value)


def text_of(value: Shown) -> str:
    """A value for people."""
    if value is None or value == "":
        return "-" if value is None else ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or 1e-4 <= abs(value) < 1000:
        return f"{value:.5g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def markdown(table: ResultTable) -> str:
    """Columns as wide as their widest cell; those in which nothing is known are left out."""
    columns = dict(enumerate(zip(*table.rows, strict=True)))
    known = {column: {*values} - {None, ""} for column, values in columns.items()}
    alike = {
        column
        for column, values in known.items()
        if table.heading[column] in table.folded and len(table.rows) > 1 and len(values) == 1
    }
    left_out = alike | {
        column
        for column, values in known.items()
        if column and (not values or table.heading[column] in table.unprinted)
    }
    kept = [column for column in columns if column not in left_out]
    same = [f"{table.heading[c]} {text_of(next(iter(known[c])))}" for c in sorted(alike)]
    notes = [*([f"All: {', '.join(same)}."] if same else []), *table.notes]
    cells = [[text_of(row[column]) for column in kept] for row in table.rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    heading = [table.heading[column] for column in kept]
    widths = [max(map(len, column)) for column in zip(heading, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    loud = [f"WARNING: {text}" for text in table.loud]
    text = [*loud, *([""] if loud else []), line(heading), rule, *map(line, cells)]
    return "\n".join([*text, *(f"\n{note}" for note in notes)]) + "\n"


def comma_separated(table: ResultTable) -> str:
    """Every column, numbers in full; what is not known is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.heading, *table.rows])
    return text.getvalue()


def strict_json(table: ResultTable) -> str:
    """`rows`: an object a row; beside it what else is known. What is not finite is a string."""
    rows = [dict(zip(table.heading, row, strict=True)) for row in table.rows]
    whole = {"rows": rows, "warnings": list(table.loud), **table.more}
    return json.dumps(_strict(whole), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _strict(one) for name, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, list | tuple) else value


STYLE = """body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}
th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left;white-space:nowrap}
td.n{text-align:right;font-variant-numeric:tabular-nums}th{cursor:pointer;background:#eee}
tr:nth-child(even){background:#f8f8f8}.loud{color:#b00;font-weight:bold}"""

SORT = """document.querySelectorAll('th').forEach((th,i)=>th.onclick=()=>{
const body=document.querySelector('tbody'),up=th.dataset.up=th.dataset.up=='1'?'0':'1';
const key=r=>{const v=r.cells[i].dataset.v;return v===''?null:isNaN(v)?v:+v};
[...body.rows].sort((x,y)=>{const a=key(x),b=key(y);
if(a===null||b===null)return(a===null)-(b===null);
if(typeof a!=typeof b)return typeof a=='number'?-1:1;
return(a<b?-1:a>b?1:0)*(up=='1'?1:-1)}).forEach(r=>body.append(r))})"""


def page(table: ResultTable) -> str:
    """HTML with one table of what is known; a click on a heading sorts by it."""
    kept = [
        c for c, values in enumerate(zip(*table.rows, strict=True)) if not c or {*values} - {None}
    ]

    def cell(value: Shown) -> str:
        number = isinstance(value, int | float)
        shown, raw = escape(text_of(value)), "" if value is None else escape(str(value))
        if raw.startswith(("https://", "http://")) or raw.endswith(("/report.html", "/report.md")):
            shown = f'<a href="{raw}">{raw.rpartition("/")[2]}</a>'
        return f'<td{" class=n" if number else ""} data-v="{raw}">{shown}</td>'

    head = "".join(f"<th>{escape(name)}</th>" for name in (table.heading[c] for c in kept))
    rows = "\n".join(
        f"<tr>{''.join(cell(row[column]) for column in kept)}</tr>" for row in table.rows
    )
    above = "".join(f'<p class="loud">WARNING: {escape(text)}</p>\n' for text in table.loud)
    below = "".join(f"<p>{escape(text)}</p>\n" for text in table.notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Runs</title>\n'
        f"<style>{STYLE}</style></head><body>\n{above}<table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table>\n{below}<script>{SORT}</script></body></html>\n"
    )


FORMS: dict[str, Callable[[ResultTable], str]] = {
    "md": markdown, "csv": comma_separated, "json": strict_json, "html": page,
}  # fmt: skip
"""--format -> the table as a text."""

"""report.html: pictures and tables of one run, or of several side by side, in one file.

The page asks for nothing from elsewhere and has no scripts; it is light or dark as its reader is.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron.analysis.layout_drawing import layout_drawing
from megatron.analysis.panels import Painter
from megatron.analysis.recorded_run import RecordedRun
from megatron.analysis.run_report import Section, headline, outcome, sections
from megatron.analysis.summary import flatten
from megatron.checkpoint.atomic import write_atomically
from megatron.config.table import value_text

REPORT = "report.html"
FOLDED = ("Provenance", "Settings")
"""Tables that are shown when they are asked for."""

STYLE = """
:root{color-scheme:light dark;
--ink:#1f2328;--faint:#59636e;--page:#f6f7f9;--card:#fff;--edge:#dfe3e8}
@media (prefers-color-scheme:dark){
:root{--ink:#e6edf3;--faint:#9aa4af;--page:#0b0f14;--card:#12181f;--edge:#2b3138}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:24px 20px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
h1{font-size:1.6rem;margin:.2em 0;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2em 0 .6em}
p{margin:.2em 0;color:var(--faint)}
.numbers{display:grid;gap:10px;margin:18px 0;
grid-template-columns:repeat(auto-fit,minmax(118px,1fr))}
.numbers div{background:var(--card);border:1px solid var(--edge);border-radius:8px;
padding:8px 12px}
.numbers span{display:block;color:var(--faint);font-size:.8rem}
.numbers b{font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.pictures,.tables{display:grid;gap:14px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
figure,.box{margin:0;padding:10px;background:var(--card);border:1px solid var(--edge);
border-radius:8px;overflow-x:auto;min-width:0}
figure>svg{display:block;width:100%;height:auto}
.box h2{margin:.1em 0 .5em}
.drawing>svg{width:auto;max-width:none}
.drawing .d-page{fill:none}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
td,th{padding:4px 10px 4px 0;text-align:left;vertical-align:top;border-top:1px solid var(--edge)}
td{overflow-wrap:anywhere}
tr:first-child>*{border-top:0}
th{font-weight:500;color:var(--faint)}
.wide td,.wide th{white-space:nowrap;overflow-wrap:normal;padding-right:18px}
details{margin-top:14px;background:var(--card);border:1px solid var(--edge);border-radius:8px;
padding:8px 12px;overflow-x:auto}
summary{cursor:pointer;font-weight:600}
"""


def write_page(runs: Sequence[RecordedRun], path: Path, plots: Path | None = None) -> None:
    """Writes the page of some runs.

    Args:
        runs: at least one.
        path: the page.
        plots: folder that takes each picture as a file as well.

    Raises:
        ConfigError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    pictures = Painter(runs).svgs()
    if plots is not None:
        plots.mkdir(exist_ok=True)
        for name, text in pictures.items():
            write_atomically(plots / f"{name}.svg", _standalone(text), durable=False)
    write_atomically(path, page(runs, pictures), durable=False)


def page(runs: Sequence[RecordedRun], pictures: dict[str, str]) -> str:
    """The page.

    Args:
        runs: what it tells of, at least one.
        pictures: SVG elements.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0], pictures) if len(runs) == 1 else _several(runs, pictures)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _one(run: RecordedRun, pictures: dict[str, str]) -> str:
    numbers = "".join(
        f"<div><span>{escape(name)}</span><b>{escape(text)}</b></div>"
        for name, text in headline(run).items()
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in outcome(run.records))
    return f'{lines}<div class="numbers">{numbers}</div>\n{_grid(pictures)}\n{_details(run)}'


def _several(runs: Sequence[RecordedRun], pictures: dict[str, str]) -> str:
    """A table with a line per run, what they differ in, all curves, then each run by itself."""
    rows = [{"run": run.name, **headline(run)} for run in runs]
    parts = [_wide(rows)]
    differing = _differing(runs)
    if differing:
        parts.append(f"<h2>Settings that differ</h2>{_wide(differing)}")
    parts.append(f"<h2>Curves</h2>{_grid(pictures)}")
    for run in runs:
        lines = "".join(f"<p>{escape(line)}</p>" for line in outcome(run.records))
        parts.append(
            f"<details><summary>{escape(run.name)}</summary>{lines}{_details(run)}</details>"
        )
    return "\n".join(parts)


def _grid(pictures: dict[str, str]) -> str:
    figures = "\n".join(f'<figure id="{name}">{svg}</figure>' for name, svg in pictures.items())
    return f'<div class="pictures">{figures}</div>'


def _details(run: RecordedRun) -> str:
    """The drawing of the ranks and all tables."""
    settings = [(name, value_text(value, "-")) for name, value in flatten(run.config).items()]
    tables = [*sections(run), Section("Settings", settings)]
    shown = [f'<div class="box"><h2>{escape(t.title)}</h2>{_table(t)}</div>'
             for t in tables if t.title not in FOLDED]  # fmt: skip
    folded = [f"<details><summary>{escape(t.title)}</summary>{_table(t)}</details>"
              for t in tables if t.title in FOLDED and t.rows]  # fmt: skip
    ranks = ""
    if (resolved := run.resolved) is not None and resolved.layout.world > 1:
        drawing = layout_drawing(
            resolved.layout,
            resolved.launch.devices_per_host or resolved.layout.world,
            resolved.stage_blocks,
        )
        ranks = f'<h2>Ranks</h2><figure class="drawing">{drawing}</figure>'
    return "\n".join(
        [ranks, f'<h2>Numbers</h2><div class="tables">{"".join(shown)}</div>', *folded]
    )


def _table(section: Section) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in section.rows
    )
    return f"<table>{rows}</table>"


def _wide(rows: Sequence[dict[str, str]]) -> str:
    """A table with a line per row and a column per key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    cells = [[f"<td>{escape(row.get(name, '-'))}</td>" for name in names] for row in rows]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="box wide"><table><tr>{head}</tr>{lines}</table></div>'


def _differing(runs: Sequence[RecordedRun]) -> list[dict[str, str]]:
    """A row per setting that is not the same in all runs, names and folders left out."""
    settings = [{k: value_text(v, "-") for k, v in flatten(run.config).items()} for run in runs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    return [
        {"setting": key.rpartition(".")[2]}
        | {run.name: values.get(key, "-") for run, values in zip(runs, settings, strict=True)}
        for key in keys
        if len({values[key] for values in settings if key in values}) > 1
        and key not in ("checkpoint.run_name", "checkpoint.run_dir")
    ]


def _standalone(svg: str) -> str:
    """A file of its own, with a page's colours."""
    style = "<style>svg{color:#1f2328;background:#fff;font-family:system-ui,sans-serif}</style>"
    head, _, rest = svg.partition(">")
    return f"{head}>{style}{rest}"

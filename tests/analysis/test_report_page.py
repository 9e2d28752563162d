"""report.html: what is in it, and that it is one file that asks for nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron.analysis import report_page
from megatron.analysis.layout_drawing import layout_drawing
from megatron.analysis.recorded_run import read_all
from megatron.config.layout import Layout
from tests.analysis import run_folder
from tools import report as command

VOID = {"meta", "link", "br", "img"}


class Checker(HTMLParser):
    """Collects the text and what is wrong with the tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            asks = name in ("src", "href", "xlink:href", "data", "action", "srcset")
            if asks and not (value or "").startswith(("#", "data:")):
                self.wrong.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.wrong.append(f"{tag} {name}")
            if name == "id":
                self.ids.append(value or "")
        if tag in ("script", "iframe", "object"):
            self.wrong.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write_page(folders: list[Path], path: Path) -> None:
    """As tools/report.py does."""
    plots = folders[0] / "plots" if len(folders) == 1 else None
    report_page.write_page(read_all(folders), path, plots)


def checked(path: Path) -> str:
    """The page's text, once it is sound."""
    page = path.read_text(encoding="utf-8")
    found = Checker(page)
    assert not found.wrong
    assert not re.findall(r"url\((?![\"']?#)|@import|https?://(?!www\.w3\.org)", page)
    return " ".join(" ".join(found.words).split())


def test_one_run_is_told_whole(tmp_path: Path) -> None:
    folder = run_folder.write(tmp_path / "my-run", world_size=4, tensor_parallel=2)
    for _ in range(2):  # a second time over the first
        write_page([folder], folder / "report.html")
    text = checked(folder / "report.html")
    for words in ("my-run", "Stopped at step 150: finished.", "best validation", "tp2 pp1 dp2",
                  "4 ranks", "stage 0", "3 layers", "60-70", "step 100", "spikes/step-100.json",
                  "60.0% of the samples; 1,500 tokens in 2 file(s)", "prose & <verse>",
                  "abc123", "<script>alert(1)</script>", "optimizer.learning_rate",
                  "Seconds per step by phase"):  # fmt: skip
        assert words in text, words
    pictures = {path.name for path in (folder / "plots").iterdir()}
    assert {"loss.svg", "phases.svg", "corpus_loss.svg"} <= pictures
    assert not list(folder.rglob("*.new"))


@pytest.mark.long
def test_the_same_run_is_the_same_page(tmp_path: Path) -> None:
    folder = run_folder.write(tmp_path / "run")
    pages = []
    for name in ("a.html", "b.html"):
        write_page([folder], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_several_runs_are_side_by_side(tmp_path: Path) -> None:
    folders = [run_folder.write(tmp_path / "a" / "x"), run_folder.write(tmp_path / "b" / "x", 1),
               run_folder.write(tmp_path / "wide", 2, world_size=2)]  # fmt: skip
    path = tmp_path / "page.html"
    write_page(folders, path)
    text = checked(path)
    assert "3 runs" in text and "Settings that differ world_size" not in text
    for words in ("a/x", "b/x", "wide", "Settings that differ", "world_size",
                  "dots: validation"):  # fmt: skip
        assert words in text, words
    assert not (folders[0] / "plots").exists()  # its own report is not this one's


def test_an_old_runs_settings_need_not_be_of_this_version(tmp_path: Path) -> None:
    folder = run_folder.write(tmp_path / "run", world_size=2)
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"tensor_parallel"', '"tensors_parallel"'))
    write_page([folder], folder / "report.html")
    assert "a colour is a host" not in checked(folder / "report.html")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder.write(tmp_path / "runs" / "a")
    assert command.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    run_folder.write(tmp_path / "runs" / "b", 1)
    assert command.main([str(tmp_path / "runs"), "-o", str(tmp_path / "both.html")]) == 0
    assert "2 runs" in checked(tmp_path / "both.html")
    capsys.readouterr()
    assert command.main([str(tmp_path / "absent")]) == 2
    assert "absent is no run" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("x\n")
    assert command.main([str(folder)]) == 3
    (folder / "run.json").write_text("[]")
    assert command.main([str(folder)]) == 3


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2, sp=2, pp=3, dp=5), Layout(tp=16, pp=12, dp=64)], ids=str
)
def test_ranks_are_drawn_where_they_are(layout: Layout) -> None:
    """Each drawn box is the rank at its place, coloured by host; many are a few and the last."""
    text = layout_drawing(layout, 4)
    place = r"rank (\d+): host (\d+), Coordinates\(pp=(\d+), dp=(\d+), sp=(\d+), tp=(\d+)"
    notes = re.findall(place, text)
    assert notes and len(text) < 60_000
    for rank, host, pp, dp, sp, tp in (map(int, note) for note in notes):
        assert layout.rank(pp, dp, tp, sp) == rank and host == rank // 4
    for place in {(note[2], note[3]) for note in notes}:  # neighbours stand side by side
        group = [int(note[0]) for note in notes if (note[2], note[3]) == place]
        assert group == [*range(group[0], group[0] + len(group))]
    assert {(layout.pp - 1, layout.dp - 1)} <= {(int(n[2]), int(n[3])) for n in notes}
    assert f"{layout.world:,} ranks" in text

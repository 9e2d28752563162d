"""report.html as a browser shows it: curves are there, nothing is asked for, nothing complains."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron.analysis.recorded_run import read_all
from megatron.analysis.report_page import write_page
from tests.analysis import run_folder

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or ""

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not BROWSER, reason="there is no chromium"),
]


def shown(page: Path, picture: Path, width: int, *flags: str) -> str:
    """Takes a screenshot; returns what the browser said."""
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={picture.parent / 'profile'}", "--virtual-time-budget=2000",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
            f"--window-size={width},2400", f"--screenshot={picture}", *flags, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert picture.exists(), done.stderr
    return done.stderr


def pixels(picture: Path) -> list[tuple[int, int, int]]:
    """Every 50th pixel, red, green and blue of 255."""
    image = importlib.import_module("matplotlib.image").imread(picture)
    every = image.reshape(-1, image.shape[-1])[::50, :3]
    return [tuple(round(float(value) * 255) for value in pixel) for pixel in every]  # type: ignore[misc]


@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_is_seen_on_wide_and_narrow_screens_light_and_dark(
    tmp_path: Path, runs: int
) -> None:
    folders = [run_folder.write(tmp_path / f"run-{n}", n, world_size=2) for n in range(runs)]
    page = tmp_path / "report.html"
    write_page(read_all(folders), page)
    brightness = {}
    for width, dark in ((1280, False), (1280, True), (400, False)):
        picture = tmp_path / f"{width}-{dark}.png"
        flags = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        said = shown(page, picture, width, *flags)
        assert "CONSOLE" not in said and "ERR_NAME_NOT_RESOLVED" not in said
        found = pixels(picture)
        brightness[width, dark] = sum(map(sum, found)) / len(found) / 3
        coloured = [p for p in found if max(p) - min(p) > 60]
        assert len(set(found)) > 100 and len(coloured) > 20  # not blank: curves are there
    assert brightness[1280, False] > 200 and brightness[400, False] > 200
    assert brightness[1280, True] < 60


def test_a_page_that_asked_for_something_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='https://example.org/x.png'><script>console.error('x')</script>")
    said = shown(page, tmp_path / "page.png", 500)
    assert "CONSOLE" in said

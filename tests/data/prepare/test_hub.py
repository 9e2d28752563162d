"""Names on the Hub: refused at once where they cannot be fetched, streamed where they can."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.data import hub_names
from megatron.data.hub_names import require_on_hub
from megatron.data.prepare import hub, text_input
from megatron.data.prepare.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def silent():
    """An endpoint that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def answering(status: int):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refused(**environ: str) -> str | None:
    try:
        require_on_hub("datasets", "org/name", "hub:org/name", environ)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.flaky(reruns=1)
def test_a_hub_that_cannot_be_reached_is_refused_in_three_seconds(silent):
    for endpoint in (silent, "http://127.0.0.1:1", "http://no-such-host.invalid"):
        began = time.monotonic()
        text = refused(HF_ENDPOINT=endpoint)
        assert time.monotonic() - began < 3
        assert f"{endpoint} cannot be reached" in text
        assert "Run `hf download org/name --repo-type dataset` where there is a network" in text


@pytest.mark.flaky(reruns=1)
def test_a_name_that_is_not_resolved_has_a_limit_too(monkeypatch):
    monkeypatch.setattr(hub_names, "WAIT_S", 0.1)

    def slow(*arguments, **options):
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(hub_names.urllib.request, "urlopen", slow)
    began = time.monotonic()
    assert "no answer in 0.1 s" in refused()
    assert time.monotonic() - began < 0.8


def test_what_the_hub_says_decides():
    with answering(404) as endpoint:
        assert f"{endpoint} knows no data set org/name" in refused(HF_ENDPOINT=endpoint)
    with answering(200) as endpoint:
        assert refused(HF_ENDPOINT=endpoint) is None
        assert "HF_HUB_OFFLINE is set" in refused(HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    with answering(401) as endpoint:  # private or gated: a token may open it
        assert refused(HF_ENDPOINT=endpoint) is None
    with answering(503) as endpoint:
        assert "cannot be reached: 503" in refused(HF_ENDPOINT=endpoint)


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer"])
def test_a_tokenizer_that_is_nowhere_is_refused_before_its_library_is_imported(
    tmp_path, monkeypatch, kind, silent
):
    for name, value in {"HF_HOME": str(tmp_path), "HF_ENDPOINT": silent}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(hub_names, "WAIT_S", 0.2)
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import would fail otherwise
    with pytest.raises(ConfigError, match="TOKENIZER_MODEL=org/tok cannot be loaded, no such fol"):
        build_tokenizer(kind, "org/tok")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="python3 -m pip install datasets"):
        list(hub.rows("hub:org/name", ["text"]))


class Found:
    """What `datasets.load_dataset` gives, as far as it is used."""

    column_names = ("text", "label")

    def __init__(self, rows):
        self.rows = rows

    def select_columns(self, names):
        return ({name: row[name] for name in names} for row in self.rows)


def test_rows_are_streamed_into_units(monkeypatch):
    rows = [{"text": f"row {i}", "label": i} for i in range(100)]
    asked = []

    class Library:
        @staticmethod
        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            return Found(rows)

    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    monkeypatch.setattr(hub, "import_module", lambda name: Library)
    monkeypatch.setattr(hub, "require_data_set", lambda *arguments: None)
    monkeypatch.setattr(text_input, "UNIT_BYTES", 300)
    units = list(text_input.units(["hub:org/name:cfg:test"], ["text"]))
    assert asked == [(("org/name", "cfg"), {"split": "test", "streaming": True})]
    assert len(units) > 5
    read = [t for unit in units for t in text_input.texts(unit, ["text"]).by_key["text"]]
    assert read == [row["text"] for row in rows]
    with pytest.raises(
        DataError, match=r"^hub:org/name has no column body; it has text, label: set DATA_KEY"
    ):
        list(hub.rows("hub:org/name", ["body"]))


@pytest.mark.long
def test_the_real_library_reads_what_it_saved_and_refuses_what_is_nowhere(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"row {i}", "label": i} for i in range(2500)]
    found = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": found}).save_to_disk(tmp_path / "set", num_shards={"train": 2})
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--tokenizer-type",
               "ByteTokenizer", "--output-prefix", str(out), "--append-eod", "--input"]  # fmt: skip
    done = subprocess.run([*command, str(tmp_path / "set")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from megatron.data.indexed import IndexedDataset

    data = IndexedDataset(f"{out}_text_document")
    assert [bytes(data.sequence(i)[:-1].tolist()).decode() for i in range(len(data))] == [
        row["text"] for row in rows
    ]
    began = time.monotonic()
    nowhere = subprocess.run([*command, "hub:org/nowhere"], capture_output=True, text=True)
    assert (nowhere.returncode, "is not in the Hugging Face cache" in nowhere.stderr) == (2, True)
    assert time.monotonic() - began < 10
    assert json.loads((tmp_path / "set/dataset_dict.json").read_text())["splits"] == ["train"]

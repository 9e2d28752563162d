"""A manifest that is not as it was written is never taken, whatever byte of it changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.manifest import MANIFEST, DamageError, read_manifest, seal
from tests.checkpoint.made import about

BEFORE = Path(__file__).parent / "written_before/step-00000003" / MANIFEST
HASH = "0" * 64
CONTENT: dict[str, Any] = {
    "format": 2,
    "iteration": 3,
    **about(3, validation_loss=2.5),
    "files": {
        "rank.safetensors": {"role": "tensors", "bytes": 10, "sha256": HASH},
        "data.json": {"role": "data", "bytes": 10, "sha256": HASH},
        "pieces.json": {"role": "pieces", "bytes": 10, "sha256": HASH},
    },
}


def read(folder: Path, text: bytes, iteration: int = 3) -> dict[str, Any]:
    """Reads a manifest of this text."""
    (folder / MANIFEST).write_bytes(text)
    return read_manifest(folder, iteration)


def test_what_was_sealed_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, seal(CONTENT))
    digest = found.pop("sha256")
    assert found == json.loads(json.dumps(CONTENT)) and len(digest) == 64 and digest != HASH


@pytest.mark.parametrize("flipped", [0x01, 0x02, 0x20])
def test_every_byte_counts(flipped: int, tmp_path: Path) -> None:
    """A wrong digit, letter, blank or bracket anywhere, the digest's own digits included."""
    text = seal(CONTENT)
    for place in range(len(text)):
        wrong = bytearray(text)
        wrong[place] ^= flipped
        with pytest.raises(DamageError, match=str(tmp_path / MANIFEST)):
            read(tmp_path, bytes(wrong))


@pytest.mark.parametrize("length", [0, 1, 20, 100, -1])
def test_a_torn_manifest_is_damage(length: int, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="is not JSON"):
        read(tmp_path, seal(CONTENT)[:length])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is no JSON object"),
        (b"3", "is no JSON object"),
        (b"{}", "format=None"),
        (b'{"format": "2"}', "format='2'"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_foreign_content_is_damage(text: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=words):
        read(tmp_path, text)


def test_no_file_or_no_folder_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=f"{MANIFEST} is missing"):
        read_manifest(tmp_path, 3)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(DamageError, match=f"{MANIFEST} is not a file"):
        read_manifest(tmp_path, 3)
    (tmp_path / "step").write_text("")
    with pytest.raises(DamageError, match="step is not a folder"):
        read_manifest(tmp_path / "step", 3)


def test_the_folder_must_be_of_its_step(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match="iteration=3, but the folder is of step 4"):
        read(tmp_path, seal(CONTENT), 4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"iteration": True}, "iteration=True"),
    ({"iteration": 3.0}, "iteration=3.0"),
    ({"format": 3}, "format=3; this version reads 1 to 2"),
    ({"format": True}, "format=True"),
    ({"state": about(4)["state"]}, "state.iteration=4"),
    ({"state": {**about(3)["state"], "consumed_samples": -1}}, "consumed_samples=-1"),
    ({"state": {**about(3)["state"], "skip_ranges": [[1]]}}, "skip_ranges"),
    ({"state": []}, "'state'"),
    ({"model": None}, "'model'"),
    ({"optimizer": 7}, "'optimizer'"),
    ({"layout": 7}, "'layout'"),
    ({"run": 7}, "'run'"),
    ({"counters": None}, "'counters'"),
    ({"loss_scaler": {"scale": "1"}}, "'loss_scaler'"),
    ({"validation_loss": "2"}, "'validation_loss'"),
    ({"files": {}}, "no file of tensors"),
    ({"files": {**CONTENT["files"], "more.json": CONTENT["files"]["data.json"]}}, "2 files of"),
    ({"files": {"../x": CONTENT["files"]["data.json"]}}, "'../x'"),
    ({"files": {"x": 7}}, "'x'"),
    ({"files": {"x": {"role": "tensors", "bytes": 1.5, "sha256": HASH}}}, "'x'"),
    ({"files": {"x": {"role": "tensors", "bytes": 1, "sha256": "no"}}}, "'x'"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_each_key_that_is_read_is_checked(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DamageError) as error:
        read(tmp_path, seal(CONTENT | change))
    assert words in str(error.value)


@pytest.mark.parametrize("key", sorted(CONTENT.keys() - {"validation_loss"}))
def test_no_key_may_be_missing(key: str, tmp_path: Path) -> None:
    with pytest.raises(DamageError):
        read(tmp_path, seal({name: value for name, value in CONTENT.items() if name != key}))


def test_weights_alone_need_no_counters(tmp_path: Path) -> None:
    content = {name: CONTENT[name] for name in CONTENT if name not in ("counters", "loss_scaler")}
    assert read(tmp_path, seal(content | {"optimizer": None}))["optimizer"] is None


def test_the_format_before_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, BEFORE.read_bytes())["layout"] == "tp2 pp1 dp2"


@pytest.mark.parametrize("word", ["files", "iteration", "state", "format", "model", "counters"])
def test_of_the_format_before_the_keys_are_checked(word: str, tmp_path: Path) -> None:
    key, wrong = f'\n "{word}"'.encode(), f'\n "{word[:-1]}q"'.encode()
    text = BEFORE.read_bytes().replace(key, wrong)
    with pytest.raises(DamageError):
        read(tmp_path, text)


@pytest.mark.parametrize("place", ['\n "iteration": ', '\n  "iteration": '])
def test_of_the_format_before_the_step_is_checked(place: str, tmp_path: Path) -> None:
    text = BEFORE.read_text().replace(f"{place}3", f"{place}7", 1)
    with pytest.raises(DamageError, match="7, but"):
        read(tmp_path, text.encode())


def test_a_manifest_cannot_pass_for_one_of_the_format_before(tmp_path: Path) -> None:
    content = json.loads(seal(CONTENT)) | {"format": 1}
    content["state"]["data"] = []
    with pytest.raises(DamageError, match="its own SHA-256"):
        read(tmp_path, json.dumps(content, indent=1).encode())

"""The streamed file is what safetensors' own reader expects, and its digest is the file's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint import rank_file
from megatron.checkpoint.rank_file import DTYPES, HostCopy, lay_out, write_file

MIXED = {
    "half": torch.arange(5).to(torch.bfloat16),
    "byte": torch.arange(7, dtype=torch.uint8),
    "wide": torch.arange(3, dtype=torch.int64),
    "flag": torch.tensor([True, False, True]),
    "none": torch.empty(0),
    "strided": torch.arange(20.0)[::3],
    "float": torch.randn(11, generator=torch.Generator().manual_seed(1)),
}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Same names, dtypes and values."""
    return found.keys() == wanted.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value)
        for key, value in wanted.items()
    )


@pytest.mark.parametrize("block", [1 << 23, 16])
def test_safetensors_reads_it(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file, "BLOCK_BYTES", block)
    path = tmp_path / "file.safetensors"
    file = lay_out(MIXED, {"pieces": '{"a": "\\u00e9"}'})
    digest = write_file(path, file)
    content = path.read_bytes()
    assert (digest.bytes, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert file.size == len(content)
    assert equal(load_file(path), MIXED)
    with safe_open(path, framework="pt") as read:
        assert read.metadata() == {"pieces": '{"a": "\\u00e9"}'}
        assert read.get_slice("strided")[1:3].tolist() == [3.0, 6.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_is_named_as_safetensors_does(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(6).to(dtype)
    write_file(tmp_path / "ours", lay_out({"x": value}, {"format": "pt"}))
    save_file({"x": value}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_dtype_that_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x: .*complex64"):
        lay_out({"x": torch.zeros(2, dtype=torch.complex64)}, {})


def test_a_rank_may_have_nothing(tmp_path: Path) -> None:
    write_file(tmp_path / "file", lay_out({}, {"pieces": "{}"}))
    assert load_file(tmp_path / "file") == {}


def test_the_copy_on_the_host_has_the_same_bytes_and_keeps_its_memory(tmp_path: Path) -> None:
    host = HostCopy()
    values = {key: value.clone() for key, value in MIXED.items()}
    file = lay_out(values, {})
    expected = write_file(tmp_path / "sync", file)
    copy = host.of(file)
    place = copy.tensors[0].data_ptr()
    for value in values.values():
        value.zero_()  # the next step
    assert write_file(tmp_path / "behind", copy) == expected
    assert host.of(lay_out(MIXED, {})).tensors[0].data_ptr() == place


def test_work_is_told_of_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_file, "BLOCK_BYTES", 64)
    ticks: list[None] = []
    file = lay_out({"x": torch.zeros(64)}, {})
    write_file(tmp_path / "file", file, lambda: ticks.append(None))
    assert len(ticks) == 1 + 256 // 64

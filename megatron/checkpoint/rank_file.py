"""One rank's safetensors file: laid out first, then streamed to disk and hashed on the way.

Eight bytes of header length, the JSON header padded to eight bytes, the tensors' bytes one after
the other, the widest dtypes first. Memory holds a few blocks besides the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 23
WAITING_BLOCKS = 4
"""Copies from a device that may wait for their hash; blocks of the host's tensors are views."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of safetensors' format."""


@dataclass(frozen=True)
class RankFile:
    """A file that is not written yet.

    Attributes:
        header: its first bytes.
        tensors: 1-D, in the order in which their bytes follow.
    """

    header: bytes
    tensors: Sequence[Tensor]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Digest:
    """Size and SHA-256, in hexadecimal digits, of a file."""

    bytes: int
    sha256: str


def lay_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> RankFile:
    """The file of 1-D tensors by key.

    Raises:
        ValueError: the format has no such dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # aligned
    end = 0
    for key, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{key}: safetensors has no dtype {tensor.dtype}")
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return RankFile(len(text).to_bytes(8, "little") + text, [tensor for _, tensor in ordered])


def write_file(path: Path, file: RankFile, tick: Callable[[], None] = lambda: None) -> Digest:
    """Writes and flushes a file; a thread hashes each block while it is written.

    Args:
        path: the file.
        file: what to write; its tensors come to the host block by block.
        tick: called after each block.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    on_host = all(tensor.device.type == "cpu" for tensor in file.tensors)
    hashed: deque[Future[None]] = deque()
    with path.open("wb") as handle, ThreadPoolExecutor(1) as hasher:
        for block in _blocks(file):
            if len(hashed) == WAITING_BLOCKS and not on_host:
                hashed.popleft().result()
            hashed.append(hasher.submit(digest.update, block))
            handle.write(block)
            size += block.nbytes
            tick()
        handle.flush()
        os.fsync(handle.fileno())
        for each in hashed:
            each.result()
    return Digest(size, digest.hexdigest())


class HostCopy:
    """Memory of the host that takes a copy of a file's tensors, kept for the next save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of(self, file: RankFile) -> RankFile:
        """The same file on the host; valid until the next call."""
        total = sum(tensor.nbytes for tensor in file.tensors)
        device = next((t.device for t in file.tensors if t.device.type != "cpu"), None)
        if self._memory.numel() < total:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._memory = torch.empty(total, dtype=torch.uint8, pin_memory=device is not None)
        copies, start = [], 0
        for tensor in file.tensors:
            place = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
            # The blocks must not wait for each other: one wait for all of them follows.
            copies.append(place.copy_(tensor.detach(), non_blocking=True))
            start += tensor.nbytes
        if device is not None:
            torch.accelerator.synchronize(device)
        return RankFile(file.header, copies)


def _blocks(file: RankFile) -> Iterator[memoryview]:
    yield memoryview(file.header)
    for tensor in file.tensors:
        length = BLOCK_BYTES // tensor.element_size()
        for start in range(0, tensor.numel(), length):
            block = tensor.detach()[start : start + length].to("cpu").contiguous()
            yield block.view(torch.uint8).numpy().data

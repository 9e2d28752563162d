"""The head's loss takes a chunk of logits and no copy of it, by this process' resident memory."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.bench_head import measured
from tests.spawn import run


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_copy_of_a_chunk_of_logits() -> None:
    """2,048 tokens and 50,000 words in bf16, a chunk: 0.2 GB."""
    ((extra, _),) = run(measured, 1, 50_000, 64, 2048)
    assert 0.19 < extra < 0.3

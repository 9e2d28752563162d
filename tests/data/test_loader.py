"""The loader against plain indexing, what it never reads, and how it ends."""

import threading
import time

import numpy as np
import pytest
import torch

from megatron.data.dataset import Sample
from megatron.data.loader import Loader, StepPlan
from megatron.training.evaluation import evaluation_loader

SEQ = 4


class CountingDataset:
    """Sample k is k, k+1, ...; remembers what was asked for."""

    def __init__(self, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.read: list[int] = []
        self._delay_s = delay_s
        self._fail_at = fail_at

    def sample(self, k: int) -> Sample:
        self.read.append(k)
        if k == self._fail_at:
            raise OSError(f"sample {k} cannot be read")
        time.sleep(self._delay_s)
        return Sample("corpus", "file", 0, k, tokens=np.arange(k * 100, k * 100 + SEQ + 1))


def steps(count: int, batch: int, skip: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    return [(i, (i - 1) * batch) for i in range(1, count + 1) if i not in skip]


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("gas", [1, 2, 3])
@pytest.mark.parametrize("mbs", [1, 2])
def test_equals_plain_indexing(dp, gas, mbs):
    batch = dp * gas * mbs
    for rank in range(dp):
        plan = StepPlan(batch, mbs, gas, rank, dp)
        with Loader(CountingDataset(), plan, steps(3, batch)) as loader:
            micro_batches = list(loader)
        assert len(micro_batches) == 3 * gas
        for number, got in enumerate(micro_batches):
            step, micro = divmod(number, gas)
            first = step * batch + micro * mbs * dp + rank * mbs  # the rule, written again
            tokens = torch.stack(
                [torch.arange(k * 100, k * 100 + SEQ + 1) for k in range(first, first + mbs)]
            )
            assert got.iteration == step + 1
            assert got.tokens.dtype == got.labels.dtype == torch.int64
            assert torch.equal(got.tokens, tokens[:, :-1])
            assert torch.equal(got.labels, tokens[:, 1:])


@pytest.mark.parametrize(("dp", "gas"), [(1, 4), (2, 2), (4, 1), (2, 1), (1, 1)])
def test_the_samples_of_a_step_do_not_depend_on_the_layout(dp, gas):
    batch, seen = 4, []
    for rank in range(dp):
        dataset = CountingDataset()
        plan = StepPlan(batch, batch // dp // gas, gas, rank, dp)
        with Loader(dataset, plan, [(8, 28)]) as loader:
            list(loader)
        seen += dataset.read
    assert sorted(seen) == [28, 29, 30, 31]


def test_skipped_steps_are_never_read_and_the_rest_is_unchanged():
    plan, skip = StepPlan(4, 2, 2, 0, 1), (2, 3, 5)
    whole, holes = CountingDataset(), CountingDataset()
    with Loader(whole, plan, steps(6, 4)) as loader:
        expected = [b for b in loader if b.iteration not in skip]
    with Loader(holes, plan, steps(6, 4, skip)) as loader:
        got = list(loader)
    assert holes.read == [k for k in whole.read if k // 4 + 1 not in skip]
    assert [b.iteration for b in got] == [1, 1, 4, 4, 6, 6]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, got, strict=True))


def test_a_resumed_loader_goes_on_where_the_other_stopped():
    plan = StepPlan(2, 1, 2, 0, 1)
    with Loader(CountingDataset(), plan, steps(6, 2)) as loader:
        whole = list(loader)
    with Loader(CountingDataset(), plan, steps(6, 2)[3:]) as loader:
        rest = list(loader)
    assert [b.tokens.tolist() for b in rest] == [b.tokens.tolist() for b in whole[6:]]


@pytest.mark.flaky(reruns=1)
def test_reading_hides_behind_the_model():
    """10 steps of 20 ms of model and 12 ms of reading: the model waits for the first step alone."""
    plan = StepPlan(4, 4, 1, 0, 1)
    with Loader(CountingDataset(delay_s=0.003), plan, steps(10, 4)) as loader:
        next(loader)
        first_wait = loader.waited_s
        for _ in loader:
            time.sleep(0.02)
    assert first_wait > 0.01
    assert loader.waited_s - first_wait < 0.04  # nothing hidden: 9 x 12 ms


def test_reading_ahead_is_bounded():
    dataset = CountingDataset()
    with Loader(dataset, StepPlan(1, 1, 1, 0, 1), ((i, i) for i in range(10**9)), 2) as loader:
        time.sleep(0.3)
        assert len(dataset.read) <= 3  # two kept ready, one in hand
        assert next(loader).iteration == 0


def test_an_error_reaches_the_consumer_after_the_good_steps():
    with Loader(CountingDataset(fail_at=5), StepPlan(2, 1, 2, 0, 1), steps(9, 2)) as loader:
        got = [next(loader) for _ in range(4)]
        assert [b.iteration for b in got] == [1, 1, 2, 2]
        with pytest.raises(OSError, match="sample 5"):
            next(loader)


@pytest.mark.flaky(reruns=1)
def test_closing_ends_the_thread_and_the_iteration():
    before = threading.active_count()
    loader = Loader(CountingDataset(delay_s=0.001), StepPlan(1, 1, 1, 0, 1), steps(10**6, 1))
    next(loader)
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 5
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_every_evaluation_sees_the_same_samples():
    plan, dataset = StepPlan(4, 2, 1, 1, 2), CountingDataset()
    for _ in range(2):
        with evaluation_loader(dataset, plan, 3) as loader:
            assert len(list(loader)) == 3
    assert dataset.read == [2, 3, 6, 7, 10, 11] * 2


@pytest.mark.parametrize("sizes", [(5, 2, 2, 1), (4, 0, 2, 1), (8, 2, 2, 1)])
def test_a_plan_that_does_not_multiply_out_is_refused(sizes):
    batch, mbs, gas, dp = sizes
    with pytest.raises(ValueError, match=rf"GLOBAL_BATCH = {batch}.*{mbs} x {gas} x {dp}"):
        StepPlan(batch, mbs, gas, 0, dp)

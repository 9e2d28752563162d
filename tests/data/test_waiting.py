"""Loading never holds a step back: the share of time that a 20 ms step waits for its data."""

import time

import numpy as np

from megatron.data.loader import Loader, StepPlan
from megatron.data.splits import build_datasets
from tests.data.pairs import write_list

SEQ = 8192
STEP_S = 0.020


def waiting_share(train, steps: int) -> float:
    """Share of `steps` steps of 4 samples that was spent waiting; the first read is start-up."""
    plan = StepPlan(4, 2, 2, 0, 1)
    with Loader(train, plan, [(i + 1, 4 * i) for i in range(steps + 1)]) as loader:
        batches = iter(loader)
        next(batches), next(batches)
        waited, began = loader.waited_s, time.perf_counter()
        for _ in range(steps):
            for _ in range(2):
                next(batches)
            time.sleep(STEP_S)  # the model, elsewhere than on this core
        return (loader.waited_s - waited) / (time.perf_counter() - began)


def test_a_step_of_20_ms_does_not_wait(tmp_path):
    rng = np.random.default_rng(0)
    sizes = {f"corpus{i}": [int(n) for n in rng.integers(40_000, 200_000, 3)] for i in range(8)}
    train = build_datasets(write_list(tmp_path, sizes), SEQ, (1, 0, 0)).train
    # The machine that runs the tests may be shared: one good round of some.
    assert any(waiting_share(train, 50) < 0.01 for _ in range(10))


def test_a_slow_disk_is_seen(tmp_path):
    """The measure itself: reading that takes twice the step is waited for half of the time."""
    train = build_datasets(write_list(tmp_path, {"a": [100_000]}), SEQ, (1, 0, 0)).train
    read = train.sample

    class Slow:
        def sample(self, k):
            time.sleep(2 * STEP_S / 4)
            return read(k)

    assert waiting_share(Slow(), 20) > 0.3

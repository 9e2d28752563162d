"""GLOBAL_BATCH, MICRO_BATCH, GRAD_ACC_STEPS, DP and the length of the run agree."""

from hypothesis import given
from hypothesis import strategies as st

from tests.config.helpers import configured, resolved

SMALL = st.integers(1, 6)


def _sizes(**settings: object) -> tuple[int, int, int]:
    train = configured(**settings).train
    return train.micro_batch_size, train.gradient_accumulation_steps, train.global_batch_size


@given(SMALL, SMALL, SMALL)
def test_any_two_give_the_third(micro, steps, ranks):
    total = micro * steps * ranks
    known = {"MICRO_BATCH": micro, "GAS": steps, "GLOBAL_BATCH": total}
    for left_out in (None, *known):
        settings = {name: value for name, value in known.items() if name != left_out}
        assert _sizes(WORLD_SIZE=ranks, **settings) == (micro, steps, total)


def test_only_the_global_batch():
    assert _sizes(GLOBAL_BATCH=64) == (16, 4, 64)  # the preset's micro-batch of 16
    assert _sizes(GLOBAL_BATCH=4) == (4, 1, 4)
    assert _sizes(GLOBAL_BATCH=18, WORLD_SIZE=2) == (9, 1, 18)
    assert _sizes(GLOBAL_BATCH=34) == (2, 17, 34)


def test_steps_and_tokens():
    assert configured(TRAIN_TOKENS=10_000).train.train_iters == 4  # 2048 a step, rounded down
    assert configured(TRAIN_ITERS=7).train.train_tokens == 7 * 2048
    both = configured(TRAIN_ITERS=4, TRAIN_TOKENS=10_000).train
    assert (both.train_iters, both.train_tokens) == (4, 10_000)
    assert configured(TRAIN_TOKENS="2e9").train.train_tokens == 2_000_000_000


def test_sources_say_what_was_derived():
    sources = resolved(GLOBAL_BATCH=64, MICRO_BATCH=2).sources
    assert sources["train.gradient_accumulation_steps"] == "GLOBAL_BATCH / (MICRO_BATCH x DP)"
    assert sources["train.global_batch_size"] == "GLOBAL_BATCH"


def test_a_run_longer_than_a_preset_says():
    assert configured(MODEL_ARCH="7B", VOCAB_SIZE=32000).train.train_tokens == 4_673_780_159_710

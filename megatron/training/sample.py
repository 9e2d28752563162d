"""A text from the model of a run, in its layout: at its end, and at evaluations."""

from __future__ import annotations

import logging
from collections.abc import Callable

from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.parallel.control import Control
from megatron.training.generate import generate
from megatron.training.optimizers.schedule_free import evaluation_weights
from megatron.training.run_data import Data

log = logging.getLogger(__name__)

_PROMPT_TOKENS = 24
_NEW_TOKENS = 64
_DRAW_S = 60.0
"""Seconds after which the sample gets no further token."""


def sample_text(
    run: RunConfig,
    engine: Engine,
    data: Data,
    control: Control,
    tick: Callable[[], None] = lambda: None,
    then: str = "the run goes on",
) -> tuple[str, str] | None:
    """A continuation of SAMPLE_PROMPT, else of the start of a validation sample.

    A collective over all ranks. It changes nothing in the run, and what fails is a warning, which
    ends with what becomes of the run (`then`).

    Returns:
        The prompt and what follows it, on rank 0; None elsewhere and where it could not be made.
    """
    try:
        prompt = control.broadcast(_prompt(run, data, then) if control.rank == 0 else None)
        if not prompt:
            return None
        with evaluation_weights(engine.optimizer, engine.refresh_weights):
            added = generate(
                engine,
                prompt,
                _NEW_TOKENS,
                vocab_size=min(run.model.vocab_size, data.tokenizer.vocab_size),
                # A short window: 64 passes over a whole sequence can take minutes.
                context=min(run.model.seq_length, len(prompt) + _NEW_TOKENS),
                control=control,
                stop_at=data.tokenizer.eod,
                limit_s=_DRAW_S,
                tick=tick,
            )
        if control.rank != 0:
            return None
        given, grown = data.tokenizer.decode(prompt), data.tokenizer.decode(prompt + added)
    except Exception as error:  # nothing of a run is worth less than its sample
        _warn(error, then)
        return None
    return given, grown.removeprefix(given)


def _prompt(run: RunConfig, data: Data, then: str) -> list[int]:
    """The prompt's ids; empty, with a warning, where it cannot be read."""
    split = data.splits.valid or data.splits.train
    assert split is not None
    try:
        if run.log.sample_prompt:
            return data.tokenizer.encode(run.log.sample_prompt)[-run.model.seq_length :]
        tokens = split.sample(0).tokens
    except Exception as error:  # told to the other ranks by the empty prompt
        _warn(error, then)
        return []
    return [int(token) for token in tokens[: min(_PROMPT_TOKENS, run.model.seq_length)]]


def _warn(error: Exception, then: str) -> None:
    log.warning(f"no sample: {type(error).__name__}: {error} ({then})")

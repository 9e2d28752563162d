#!/usr/bin/env python3
"""Loss, perplexity and accuracy of any checkpoint, or of a Hugging Face folder, in one process.

    python3 tools/evaluate.py RUN                        # the samples of the run's own evaluations
    python3 tools/evaluate.py RUN LIST [--samples 1000]  # a data list, corpus by corpus
    python3 tools/evaluate.py RUN --data book.txt        # a text file

RUN is a run's folder or name, a checkpoint (checkpoints/step-N), or a Hugging Face folder. Exit
status: 0, 2 for a wrong setting, 3 for wrong data, 4 for no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.named_model import add_model, loaded, named, say
from megatron.config.errors import ConfigError, DataError, MissingCheckpoint

if TYPE_CHECKING:
    from megatron.analysis.corpus_scores import CorpusSample
    from megatron.data.prepare.tokenizer import Tokenizer
    from megatron.training.saved_model import SavedModel

EVERY_S = 2.0  # between two lines of progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(parser)
    add = parser.add_argument
    add("list", nargs="?", metavar="LIST", help="data list; default the run's own data")
    add("--data", metavar="TEXT", help="a text file instead")
    add("--split", choices=("validation", "test", "train"), default="validation",
        help="of the run's own data; default validation")  # fmt: skip
    add("--samples", type=int, metavar="N", help="at most; default those of an evaluation, or all")
    add("--batch", type=int, default=4, metavar="B", help="samples computed at a time; default 4")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except (ConfigError, DataError, MissingCheckpoint) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def run(options: argparse.Namespace) -> int:
    """Loads the model, reads the data and prints the figures."""
    for name in ("samples", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if options.list and options.data:
        raise ConfigError("LIST and --data TEXT are alternatives: give one of them")
    logging.basicConfig(level=logging.WARNING)
    from megatron.analysis.corpus_scores import scores

    saved = named(options)
    if saved.run is None and not (options.list or options.data):
        raise ConfigError(f"{saved.where} was not trained here: give a LIST, or --data TEXT")
    model, tokenizer = loaded(saved, options)
    samples = _samples(options, saved, tokenizer)
    found = scores(model, samples, options.batch, _Progress().tell)
    if options.json:
        print(json.dumps({"model": str(saved.where), "iteration": saved.iteration, **found}))
    else:
        print(_table(found))
    return 0


def _samples(
    options: argparse.Namespace, saved: SavedModel, tokenizer: Tokenizer
) -> Iterator[CorpusSample]:
    from megatron.analysis import corpus_scores

    length, vocabulary = saved.shape.seq_length, saved.shape.vocab_size
    if options.data:
        try:
            text = Path(options.data).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--data {options.data} cannot be read as text: {error}") from None
        return corpus_scores.of_text(text, length, tokenizer, options.samples)
    if options.list:
        return corpus_scores.of_list(options.list, length, tokenizer, vocabulary, options.samples)
    assert saved.run is not None
    return corpus_scores.of_run(saved.run, options.split, options.samples)


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per corpus, the whole last, and how long it took."""
    width = max(len("corpus"), *(len(name) for name in found))
    heads = f"{'corpus':{width}}  {'loss':>9}  {'perplexity':>11}  {'accuracy':>8}"
    lines = [f"{heads}  {'tokens':>11}  {'samples':>8}"]
    shown = found if len(found) > 2 else {"all": found["all"]}
    for name, row in shown.items():
        lines.append(
            f"{name:{width}}  {row['loss']:9.6f}  {row['perplexity']:11.4f}  {row['accuracy']:8.4f}"
            f"  {row['tokens']:11,}  {row['samples']:8,}"
        )
    whole = found["all"]
    lines.append(
        f"{whole['seconds']:.1f} s, {whole['samples_per_s']:.1f} samples/s, "
        f"{whole['tokens_per_s']:,.0f} tokens/s"
    )
    return "\n".join(lines)


class _Progress:
    """A line now and then while nothing else is to be seen."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, done: int) -> None:
        """Says how many samples are done."""
        if time.monotonic() - self._last > EVERY_S:
            self._last = time.monotonic()
            say(f"{done:,} samples done")


if __name__ == "__main__":
    sys.exit(main())

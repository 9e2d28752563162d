#!/usr/bin/env python3
"""Explains a step of a run: each sample's corpus, file, documents and text. Needs no accelerator.

    python3 tools/inspect_batch.py --run RUN --step 120 [--rank 3] [--decode] [--json]
    python3 tools/inspect_batch.py --run RUN --step 120 --loss RUN/checkpoints/step-00000100
    python3 tools/inspect_batch.py --run RUN --find-document data/books_text_document:17

RUN is a run's folder. Exit status: 0, 2 for a wrong setting, 3 for wrong data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

import torch

from megatron.analysis.explain import RunHistory
from megatron.config.errors import ConfigError, DataError, MissingCheckpoint
from megatron.config.schema import RunConfig
from megatron.data.indexed import DocumentPart
from megatron.data.loader import StepPlan
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.training.suspects import ExplainedSample, documents_text

_SHOWN_TOKENS = 16
_SHOWN_TEXT = 400


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        history = RunHistory(options.run)
        if options.find_document is not None:
            _print_uses(history, options.find_document, options.json)
        elif options.step is None:
            raise ConfigError("give --step N or --find-document FILE:NUMBER")
        else:
            _print_step(history, options)
    except (ConfigError, DataError, MissingCheckpoint) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _print_step(history: RunHistory, options: argparse.Namespace) -> None:
    whole = history.samples(options.step)
    rank = options.rank
    numbers = whole if rank is None else _samples_of_rank(history.run, whole, rank)
    samples = [history.explain(number) for number in numbers]
    losses: list[float | None] = [None] * len(samples)
    if options.loss is not None:
        from megatron.training.saved_model import WholeModel, find

        follows = history.run.data.follows_documents
        eod = {"eod": history.tokenizer().eod} if follows else {}
        model = WholeModel(find(str(options.loss)), torch.device("cpu"), torch.float32, **eod)
        read = (torch.from_numpy(sample.tokens)[None] for sample in samples)
        found = [model.score(one).mean_losses()[0] for one in read]
        order = sorted(range(len(samples)), key=lambda place: -found[place])
        samples, losses = [samples[i] for i in order], [found[i] for i in order]
    tokenizer = history.tokenizer() if options.decode else None
    rows = [_row(*each, tokenizer) for each in zip(samples, losses, strict=True)]
    status = history.step_status(options.step)
    if options.json:
        step = {
            "step": options.step,
            "fate": status,
            "first_sample": whole.start,
            "samples": rows,
        }
        print(json.dumps(step, indent=1))
        return
    print(f"step {options.step} ({status}): samples {whole.start:,} to {whole.stop - 1:,}")
    for row in rows:
        _print_sample(row)


def _samples_of_rank(run: RunConfig, whole: range, rank: int) -> list[int]:
    """Samples of a step that a rank reads, in its order, as run.json lays the ranks out."""
    layout, train = run.layout, run.train
    if not 0 <= rank < layout.world:
        raise ConfigError(f"--rank {rank}: the run has ranks 0 to {layout.world - 1}")
    place = layout.coordinates(rank)
    if len(whole) not in [size for _, _, size in run.batch_sizes.stretches()]:
        raise ConfigError(
            f"--rank: the step had {len(whole)} samples, but run.json lays out "
            f"{train.global_batch_size}; leave --rank out"
        )
    gas = len(whole) // (train.micro_batch_size * layout.dp)
    plan = StepPlan(len(whole), train.micro_batch_size, gas, place.dp, layout.dp)
    return [k for number in range(gas) for k in plan.micro_batch(whole.start, number)]


def _row(
    sample: ExplainedSample, loss: float | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "sample": sample.sample,
        "corpus": sample.corpus,
        "file": sample.file,
        "epoch": sample.epoch,
        "index": sample.index,
        "documents": [part._asdict() for part in sample.parts],
        "tokens": sample.tokens.tolist(),
    }
    if loss is not None:
        row["loss"] = loss
    if tokenizer is not None:
        row["text"] = tokenizer.decode(row["tokens"])
    return row


def _print_sample(row: dict[str, Any]) -> None:
    loss = f"  loss {row['loss']:.6f}" if "loss" in row else ""
    print(f"\nsample {row['sample']:,}  {row['corpus']}  {row['file']}  epoch {row['epoch']}{loss}")
    parts = row["documents"]
    print(f"  documents {documents_text([DocumentPart(**part) for part in parts])}")
    head = " ".join(map(str, row["tokens"][:_SHOWN_TOKENS]))
    print(f"  tokens {head} ... ({len(row['tokens'])})")
    if "text" in row:
        text = row["text"]
        print(f"  text {text[:_SHOWN_TEXT]!r}{' ...' if len(text) > _SHOWN_TEXT else ''}")


def _print_uses(history: RunHistory, wanted: str, as_json: bool) -> None:
    prefix, colon, number = wanted.rpartition(":")
    if not colon or not number.isdigit():
        raise ConfigError(f"--find-document {wanted}: give FILE:NUMBER, e.g. data/books:17")
    uses = [
        {"step": step, "sample": sample, "epoch": epoch}
        for step, sample, epoch in history.find_document(prefix, int(number))
    ]
    if as_json:
        print(json.dumps(uses, indent=1))
        return
    for use in uses:
        print("step {step:,}  sample {sample:,}  epoch {epoch}".format(**use))
    last = history.run.train.train_iters
    print(f"{len(uses)} sample(s) hold tokens of document {number} of {prefix} until step {last:,}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="the run's folder")
    add("--step", type=int, help="the step to explain, as the log numbers it")
    add("--rank", type=int, help="only the samples that this rank reads")
    add("--decode", action="store_true", help="also as text")
    add("--json", action="store_true", help="everything, as JSON")
    add("--loss", type=Path, metavar="CHECKPOINT", help="rank the samples by their loss under it")
    add("--find-document", metavar="FILE:NUMBER", help="print the steps that read a document")
    return parser


if __name__ == "__main__":
    sys.exit(main())

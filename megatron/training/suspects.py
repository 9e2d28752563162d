"""The samples of a step that spiked: where each came from, its text, and how to leave it out.

"Suspect", not "bad": a spike comes of the state and the samples together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.data.dataset import LaterDataset, Sample, SampleSource, StagedDataset
from megatron.data.indexed import DocumentPart, IndexedDataset
from megatron.data.megatron_order.order import MegatronDataset
from megatron.data.prepare.documents import parts_of
from megatron.training.stability import Judgement, Score

SHOWN_SAMPLES = 64
SHOWN_TEXT = 200  # characters


@dataclass(frozen=True, kw_only=True)
class ExplainedSample(Sample):
    """A sample of a step: where it comes from and its tokens, int64 (S + 1,).

    Attributes:
        sample: its number in the run.
        parts: its tokens by document; none where the order is not one of ours.
    """

    sample: int
    parts: list[DocumentPart]


def explained(order: SampleSource, sample: int) -> ExplainedSample:
    """Where a sample of an order comes from, and its tokens.

    Args:
        order: of the run.
        sample: its number in the run.
    """
    first = 0
    if isinstance(order, LaterDataset):
        first, order = order.first, order.dataset
    found = order.sample(sample - first)
    parts: list[DocumentPart] = []
    if isinstance(order, MegatronDataset):
        _, reader, number = order.find(sample - first)
        parts = [part for part in reader.parts(number) if part.length]
    elif isinstance(order, StagedDataset):
        length = len(found.tokens)  # S + 1: the last token is the next sample's first
        dataset = IndexedDataset(found.file, check=False)
        parts = parts_of(dataset, found.index * (length - 1), length)
    return ExplainedSample(**vars(found), sample=sample, parts=parts)


def documents_text(parts: list[DocumentPart], shown: int = 12) -> str:
    """`document[first:stop]` for each part, in tokens of the document."""
    texts = [f"{p.document}[{p.offset}:{p.offset + p.length}]" for p in parts[:shown]]
    return " ".join(texts) + (f" and {len(parts) - shown} more" if len(parts) > shown else "")


def write_suspects(
    run_folder: Path,
    step: int,
    judgement: Judgement,
    action: str,
    samples: range,
    order: SampleSource,
    decode: Callable[[list[int]], str],
) -> Path:
    """Writes RUN/spikes/step-N.md about a step.

    Args:
        run_folder: of the run.
        step: its number.
        judgement: its scores.
        action: what was done about it.
        samples: its samples in the run.
        order: they are read from.
        decode: tokens to text.
    """
    path = run_folder / "spikes" / f"step-{step}.md"
    path.parent.mkdir(exist_ok=True)
    lines = [
        f"# Spike at step {step}",
        "",
        "| | value | median of the window | deviations above it |",
        "|---|---|---|---|",
        _row("lm loss", judgement.loss),
        _row("gradient norm", judgement.grad_norm),
        "",
        f"Window: {judgement.steps} steps. Action: {action}.",
        "",
        "## Suspect samples",
        "",
        f"Samples {samples.start} to {samples.stop - 1}. They are suspect, not proven bad: a spike",
        "comes of weights, optimizer states and samples together.",
        "",
        *_samples(samples, order, decode),
        "## To leave the step out",
        "",
        f"    --train-range-to-skip {step} {step}",
        "",
        f"in a start from a checkpoint before step {step}. All its samples, as text:",
        "",
        f"    python3 tools/inspect_batch.py --run {run_folder} --step {step} --decode",
        "",
    ]
    write_atomically(path, "\n".join(lines))
    return path


def _samples(
    samples: range, order: SampleSource, decode: Callable[[list[int]], str]
) -> Iterator[str]:
    for number in samples[:SHOWN_SAMPLES]:
        one = explained(order, number)
        yield f"- sample {number}: corpus {one.corpus}, file {one.file}, epoch {one.epoch}, "
        yield f"  documents {documents_text(one.parts)}"
        # A token is a character or more, but for a few.
        yield f"  {decode(one.tokens[:SHOWN_TEXT].tolist())[:SHOWN_TEXT]!a}"
        yield ""
    if len(samples) > SHOWN_SAMPLES:
        yield f"and {len(samples) - SHOWN_SAMPLES} more.\n"


def _row(name: str, score: Score) -> str:
    known = score.median is not None and score.z is not None
    rest = f"{score.median:.6g} | {score.z:.1f}" if known else "too few steps | unknown"
    return f"| {name} | {score.value:.6g} | {rest} |"

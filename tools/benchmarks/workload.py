"""What is measured: a model's shape and batch as variables of a run, its samples and its weights.

Every arm of a comparison makes the same `Workload` from the same plain values, so it trains the
same model on the same tokens with the same optimizer settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.errors import ConfigError
from megatron.config.resolve import Site, resolve
from megatron.config.schema import RunConfig, by_variable

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("NLAYERS", "HIDDEN", "FFN_HIDDEN_SIZE", "HEADS", "NUM_KV_HEAD", "VOCAB_SIZE", "SEQ")
SHAPES: Mapping[str, Mapping[str, str]] = {
    name: dict(zip((*FIELDS, "MICRO_BATCH"), map(str, numbers), strict=True))
    for name, numbers in {
        "tiny": (2, 64, 176, 4, 2, 512, 64, 2),
        "shakespeare": (4, 128, 344, 4, 4, 128, 64, 12),  # nanoGPT's CPU sizes, with SwiGLU
        "40m": (8, 512, 1408, 8, 4, 16384, 512, 4),
        "106m": (12, 768, 2048, 12, 4, 19968, 512, 4),
        "1b": (16, 2048, 8192, 32, 8, 32768, 4096, 2),
        "llama3-14": (14, 3072, 8192, 24, 8, 256000, 8192, 1),
    }.items()
}
"""Name -> variables of a run: layers, widths, heads, vocabulary, sequence, samples."""

FIXED = {
    "TOKENIZER_TYPE": "NullTokenizer",
    "DRY_RUN": "1",  # no data is read: the samples come from here
    "WORLD_SIZE": "1",
    "LR": "1e-4",
    "LR_DECAY_STYLE": "constant",
    "LR_WARMUP_ITERS": "0",
    "TRAIN_ITERS": "1000",
}
SEED = 20261122


@dataclass(frozen=True)
class Workload:
    """Plain values: it travels to the processes that measure.

    Attributes:
        variables: of the run, besides FIXED.
        dtype: bf16 or fp32.
        weights: folder of the initial weights in Hugging Face's format; None: drawn.
        threads: of OpenMP, in each process; 0: torch's choice.
    """

    variables: Mapping[str, str]
    dtype: str = "fp32"
    weights: Path | None = None
    threads: int = 0
    kept: Mapping[str, str] = field(default_factory=lambda: FIXED)

    def run(self, **more: str) -> RunConfig:
        """The configuration that a user would have made with these variables."""
        return resolve({**self.kept, "DTYPE": self.dtype, **self.variables, **more}, [], Site()).run

    def batches(self, rank: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """(tokens, labels) of each micro-batch of a step, each (B, S) int64, forever.

        Eight different steps, again and again: drawing tokens must not take time.
        """
        import torch

        train, model = self.run().train, self.run().model
        shape = (8, train.gradient_accumulation_steps, train.micro_batch_size, model.seq_length + 1)
        generator = torch.Generator().manual_seed(SEED + rank)
        drawn = torch.randint(0, model.vocab_size, shape, generator=generator)
        steps = [
            [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in step]
            for step in drawn
        ]
        while True:
            yield from steps


def shape_variables(text: str) -> dict[str, str]:
    """A name of SHAPES, or variables such as NLAYERS=4,HIDDEN=256,...; a name may come first.

    Raises:
        ConfigError: neither.
    """
    first, *rest = text.split(",")
    found = dict(SHAPES.get(first, {}))
    if not found:
        rest = [first, *rest]
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals or name not in by_variable():
            raise ConfigError(
                f"--shape {text}: {part} is neither VARIABLE=value nor one of {', '.join(SHAPES)}"
            )
        found[name] = value
    return found


def export(work: Workload, folder: Path) -> None:
    """Writes the initial weights of the run as a Hugging Face folder, in fp32."""
    import torch

    from megatron.checkpoint import huggingface
    from megatron.model.stack import Stack
    from megatron.training.build import model_layers

    run = work.run(DTYPE="fp32", DEVICE="cpu")
    weights: dict[str, Any] = dict(Stack(model_layers(run)).named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    huggingface.write_config(run.model, folder, "float32", None, None)
    with torch.no_grad():
        huggingface.export_weights(weights.__getitem__, shapes, run.model, folder, torch.float32)

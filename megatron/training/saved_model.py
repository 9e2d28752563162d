"""A checkpoint of any layout, or a Hugging Face folder, as one whole model in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.checkpoint import foreign, huggingface, imported, store
from megatron.config.errors import ConfigError, MissingCheckpoint
from megatron.config.schema import RUN_FILE, RunConfig
from megatron.config.shape import ModelShape
from megatron.data.data_list import BUILTIN
from megatron.data.prepare.builtin import builtin_corpus
from megatron.data.prepare.tokenizer import HFTokenizer, Tokenizer, build_tokenizer
from megatron.model.document_mask import Documents, follow_documents
from megatron.model.kv_cache import KeyValueCache, can_cache, keep_keys_and_values
from megatron.model.layer import ModelContext
from megatron.model.registry import ARCHITECTURES
from megatron.model.stack import Stack
from megatron.parallel.groups import SERIAL
from megatron.parallel.head_loss import Targets
from megatron.training.accuracy import with_correct
from megatron.training.build import documents_followed
from megatron.training.hf_export import evaluated_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SavedModel:
    """A model that is not loaded yet.

    Attributes:
        where: its folder.
        shape: of the model.
        read: our name of a parameter -> all of it, fp32, with the vocabulary's padding or more.
        dtype: that it was trained in, a value of DTYPE.
        run: that trained it; None for a model of Hugging Face, also one imported and not trained.
        iteration: its last step; None for a Hugging Face folder.
        files: folder with the tokenizer of a Hugging Face model.
        tokenizer_digest: fingerprint of the tokenizer that the model was trained with.
    """

    where: Path
    shape: ModelShape
    read: Callable[[str], Tensor]
    dtype: str
    run: RunConfig | None = None
    iteration: int | None = None
    files: Path | None = None
    tokenizer_digest: str | None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with.

        Raises:
            ConfigError: it cannot be loaded, or is another by now.
        """
        if self.run is None:
            return _tokenizer_in(self.files or self.where)
        data = self.run.data
        if data.data_file_list == BUILTIN:
            found = builtin_corpus(data.tokenizer_type, data.tokenizer_model, lambda _: None)
            tokenizer = found.tokenizer
        else:
            size = self.run.model.vocab_size
            tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model, size)
        if self.tokenizer_digest not in (None, tokenizer.fingerprint()):
            raise ConfigError(
                f"{self.where} was trained with another tokenizer than TOKENIZER_TYPE="
                f"{data.tokenizer_type} TOKENIZER_MODEL={data.tokenizer_model} is now: its ids "
                "would be other words"
            )
        return tokenizer


class Scores(NamedTuple):
    """Of each token of (B, S), on the model's device.

    Attributes:
        losses: fp32.
        correct: whether it is the likeliest.
        counts: 1 where its loss counts, else 0.
    """

    losses: Tensor
    correct: Tensor
    counts: Tensor

    def mean_losses(self) -> list[float]:
        """Of each sample, over its tokens that count."""
        means = (self.losses * self.counts).sum(1) / self.counts.sum(1).clamp(min=1)
        return list(means.tolist())


class WholeModel(Stack):
    """All layers of a model on one device.

    Attributes:
        shape: of the model.
        documents: what its masks and losses follow; None: nothing.
        caches: of all attentions, empty where the model computes all of a text for each token.
    """

    def __init__(
        self,
        saved: SavedModel,
        device: torch.device,
        dtype: torch.dtype,
        *,
        eod: int = -1,
        cached: bool = False,
    ) -> None:
        """Loads the weights, one at a time.

        Args:
            saved: the model.
            device, dtype: of its weights.
            eod: id that ends a document, for a run whose masks or losses follow documents.
            cached: keep keys and values of a growing text, where the model can.
        """
        self.shape = saved.shape
        layers = ARCHITECTURES[saved.shape.architecture].layers(saved.shape, ModelContext())
        documents = None if saved.run is None else documents_followed(saved.run, eod)
        if documents is not None:
            layers = [follow_documents(layer, documents) for layer in layers]
        with torch.device("meta"):
            super().__init__(layers)
        self.to(dtype).to_empty(device=device)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                parameter.copy_(saved.read(name)[: len(parameter)])  # its padding depends on TP
        self.documents: Documents | None = documents
        self.caches: list[KeyValueCache] = []
        if cached and documents is None and can_cache(layers):
            self.caches = keep_keys_and_values(self)
        self.device = device

    @torch.no_grad()
    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits (V,) of the token after `tokens`, fp32 on the host, without the padding's.

        With caches `tokens` are those since the last call, else the whole text.
        """
        hidden = self._hidden(torch.tensor([tokens], device=self.device))
        return self._head(hidden[:, -1:])[0, 0, : self.shape.vocab_size].float().cpu()

    @torch.no_grad()
    def score(self, samples: Tensor) -> Scores:
        """How well it predicts samples (B, S + 1), int64, each from its second token on."""
        samples = samples.to(self.device)
        hidden, found = self._hidden(samples[:, :-1]), []
        targets = with_correct(
            Targets(samples[:, 1:]), SERIAL, self.shape.vocab_size, lambda *two: found.append(two)
        )
        self._head(hidden, targets)
        ((losses, correct),) = found
        follows = self.documents is not None and self.documents.mask_loss
        counts = self.documents.weights if self.documents and follows else torch.ones_like(losses)
        return Scores(losses, correct, counts)

    def _hidden(self, tokens: Tensor) -> Tensor:
        """(B, S, H) after the final norm."""
        if self.documents is not None:
            self.documents.show(tokens)
        x = tokens
        for call in self._calls:
            x = call(x)
        return x


def text_begins(saved: SavedModel, tokenizer: Tokenizer) -> list[int]:
    """Ids before a prompt: what transformers puts there for its models; for a run's none."""
    if saved.run is not None:
        return []
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.beginning()
    begins = huggingface.read_config(saved.files).get("bos_token_id") if saved.files else None
    return [] if begins is None else [int(begins)]


def find(given: str, iteration: int | None = None) -> SavedModel:
    """The model that a user names.

    Args:
        given: a run's folder or its name under runs/, a folder of checkpoints, a checkpoint, or a
            Hugging Face folder.
        iteration: step of a run; None: the newest.

    Raises:
        MissingCheckpoint: there is none, or it is damaged.
        ConfigError: a Hugging Face model that is not computed here.
    """
    path = Path(given)
    if not path.exists() and (Path("runs") / given).is_dir():
        path = Path("runs") / given
    checkpoint = _checkpoint(path, iteration)
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, path)
    if iteration is None and (path / huggingface.CONFIG).is_file():
        try:
            shape = huggingface.read_shape(path)
            read = huggingface.open_weights(path, shape)
            dtype = _dtype_of(path)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path}: {error}") from None
        return SavedModel(path, shape, read, dtype, files=path)
    step = "" if iteration is None else f" of step {iteration}"
    raise MissingCheckpoint(
        f"{given} is no checkpoint{step}: give a run's folder or name, a folder checkpoints/step-N,"
        f" or a Hugging Face folder; it {foreign.contents(path)}"
    )


def _checkpoint(path: Path, iteration: int | None) -> store.Checkpoint | None:
    """The checkpoint that a path names: itself, or the newest or given one of a run."""
    if path.name.startswith("step-"):
        found = [one for one in store.committed(path.parent) if one.folder.name == path.name]
        return found[0] if found and iteration in (None, found[0].iteration) else None
    for root in _roots(path):
        for one in store.committed(root):
            if iteration in (None, one.iteration):
                return one
    return None


def _roots(path: Path) -> list[Path]:
    """Where the checkpoints of a run's folder may be."""
    roots = [path / "checkpoints", path]
    try:
        settings = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["config"]["checkpoint"]
        return [Path(settings["save"]), *roots] if settings.get("save") else roots
    except (OSError, ValueError, KeyError, TypeError):
        return roots


def _of_checkpoint(checkpoint: store.Checkpoint, path: Path) -> SavedModel:
    damage = store.damage(checkpoint)
    if damage:
        raise MissingCheckpoint(f"{checkpoint.folder} is damaged:\n" + "\n".join(damage))
    manifest = checkpoint.manifest
    read = evaluated_weights(checkpoint.reader(), manifest)
    settings: dict[str, Any] = manifest.get("run", {})
    if settings:
        run = RunConfig.from_dict(settings)
        stages = checkpoint.state().data
        digest = stages[-1].record.get("tokenizer") if stages else None
        shape, dtype = run.model, run.train.dtype
        return SavedModel(
            checkpoint.folder, shape, read, dtype, run, checkpoint.iteration, None, digest
        )
    kept = imported.find([checkpoint.folder.parent.parent, path], manifest["model"])
    length = 2048 if kept is None else huggingface.read_shape(kept).seq_length
    shape = ModelShape(**manifest["model"], seq_length=length)
    dtype = "fp32" if kept is None else _dtype_of(kept)
    return SavedModel(
        checkpoint.folder, shape, read, dtype, None, checkpoint.iteration, kept or path
    )


def _dtype_of(folder: Path) -> str:
    """DTYPE of a Hugging Face model; fp32 where its config.json names none."""
    config = huggingface.read_config(folder)
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return next((ours for ours, kind in DTYPES.items() if str(kind) == f"torch.{named}"), "fp32")


def _tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer among a Hugging Face model's files."""
    names = [path.name for path in imported.tokenizer_files(folder)]
    if not names:
        raise ConfigError(f"{folder} has no tokenizer: copy that of the model into it")
    if names == ["tokenizer.model"]:
        return build_tokenizer("SentencePieceTokenizer", str(folder / "tokenizer.model"))
    return build_tokenizer("HFTokenizer", str(folder))

"""From a run's configuration to the layers of its model and their loss."""

from __future__ import annotations

from functools import partial

from megatron.config.schema import RunConfig
from megatron.engine import LossFunction
from megatron.model.document_mask import Documents
from megatron.model.layer import Layer, ModelContext
from megatron.parallel.cross_entropy import (
    mean_vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron.parallel.groups import SERIAL, Axis
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.optimizers.sophia import with_sampled_labels

RECOMPUTE = {"0": "none", "1": "full", "selective": "selective"}


def model_layers(
    run: RunConfig, tp: Axis = SERIAL, sp: Axis = SERIAL, expand_kv: bool = False
) -> list[Layer]:
    """The run's model on these axes: tokens (B, S) in, this rank's logits (B, S, V/tp) out.

    Args:
        run: the configuration.
        tp, sp: this rank's axes.
        expand_kv: the answer of `attention_kernel.expands_kv` for this rank's device.
    """
    recompute = RECOMPUTE[run.train.activation_checkpointing]
    # The engine recomputes groups of blocks; a single block recomputes itself.
    if recompute == "full" and run.train.checkpoint_num_layers > 1:
        recompute = "none"
    context = ModelContext(
        tp=tp,
        sp=sp,
        seed=run.train.seed,
        recompute=recompute,
        sequence_parallel=run.parallel.megatron_sequence_parallel and tp.size > 1,
        no_flash_attention=run.train.no_flash_attention,
        expand_kv=expand_kv,
    )
    return run.architecture.layers(run.model, context)


def block_input(run: RunConfig) -> tuple[int, int, int]:
    """(B, s, H) of what a block takes in a training step on each rank."""
    layout = run.parallel
    shards = layout.sequence_parallel
    if layout.megatron_sequence_parallel:
        shards *= layout.tensor_parallel
    return run.train.micro_batch_size, run.model.seq_length // shards, run.model.hidden_size


def documents_followed(run: RunConfig, eod: int) -> Documents | None:
    """What the ends of documents decide in this run, None where nothing; `eod` ends a document."""
    data = run.data
    if not data.follows_documents:
        return None
    return Documents(
        eod,
        own_attention=data.reset_attention_mask,
        own_positions=data.reset_position_ids,
        mask_loss=data.eod_mask_loss,
        no_flash=run.train.no_flash_attention,
    )


def loss_function(
    run: RunConfig,
    tp: Axis = SERIAL,
    corpus_losses: CorpusLosses | None = None,
    documents: Documents | None = None,
) -> LossFunction:
    """loss(logits (B, S, V/tp), labels (B, S)) -> mean over tokens, equal on all ranks of `tp`.

    Args:
        run: the configuration.
        tp: tensor-parallel axis.
        corpus_losses: counts the loss of each corpus.
        documents: with EOD_MASK_LOSS, knows which tokens count.
    """
    vocab_size = run.model.vocab_size
    loss: LossFunction = partial(mean_vocab_parallel_cross_entropy, tp=tp, vocab_size=vocab_size)
    masked = documents if documents is not None and documents.mask_loss else None
    token_loss = partial(vocab_parallel_cross_entropy, tp=tp, vocab_size=vocab_size)
    if corpus_losses is not None:
        loss = corpus_losses.counted(token_loss, masked)
    elif masked is not None:
        loss = masked.counted(token_loss)
    if run.optimizer.optimizer == "sophiag":
        loss = with_sampled_labels(loss, tp, vocab_size)
    return loss

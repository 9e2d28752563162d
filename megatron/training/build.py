"""From a run's configuration to the layers of its model and what their loss is of."""

from __future__ import annotations

from megatron.config.schema import RunConfig
from megatron.model.document_mask import Documents
from megatron.model.layer import Layer, ModelContext
from megatron.parallel.groups import SERIAL, Axis
from megatron.parallel.head_loss import Targets, TargetsOf
from megatron.training.attention_kernel import TORCHS, AttentionChoice
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.optimizers.sophia import with_sampled_labels

RECOMPUTE = {"0": "none", "1": "full", "selective": "selective"}


def model_layers(
    run: RunConfig,
    tp: Axis = SERIAL,
    sp: Axis = SERIAL,
    attention: AttentionChoice = TORCHS,
    *,
    draw: bool = True,
) -> list[Layer]:
    """The run's model on these axes: tokens (B, S) in, loss or this rank's logits out.

    Args:
        run: the configuration.
        tp, sp: this rank's axes.
        attention: what `attention_kernel.chosen` says for this rank's device.
        draw: initial weights; False: a checkpoint is to bring every one.
    """
    recompute = RECOMPUTE[run.train.activation_checkpointing]
    # The engine recomputes groups of blocks; a single block recomputes itself.
    if recompute == "full" and run.train.checkpoint_num_layers > 1:
        recompute = "none"
    context = ModelContext(
        tp=tp,
        sp=sp,
        seed=run.train.seed if draw else None,
        recompute=recompute,
        sequence_parallel=run.parallel.megatron_sequence_parallel and tp.size > 1,
        attention_kernels=attention.kernels,
        expand_kv=attention.expand_kv,
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


def loss_targets(
    run: RunConfig,
    tp: Axis = SERIAL,
    corpus_losses: CorpusLosses | None = None,
    documents: Documents | None = None,
) -> TargetsOf:
    """What the head's loss of labels (B, S) is: the mean over tokens, or over those that count.

    Args:
        run: the configuration.
        tp: tensor-parallel axis.
        corpus_losses: counts the loss of each corpus.
        documents: with EOD_MASK_LOSS, knows which tokens count.
    """
    targets: TargetsOf = Targets
    if documents is not None and documents.mask_loss:
        targets = documents.targets
    if corpus_losses is not None:
        targets = corpus_losses.counted(targets)
    if run.optimizer.optimizer == "sophiag":
        targets = with_sampled_labels(targets, tp, run.model.vocab_size)
    return targets

"""Other programs' training loops: the same weights, tokens and AdamW, each in its own usual form.

In bf16 they keep fp32 weights and compute under autocast, as their trainers do; the arms named
`-bf16` have weights and states in bf16 alone: less work than ours, whose master weights are fp32.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from tools.benchmarks.rounds import Rounds
from tools.benchmarks.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from megatron.config.schema import RunConfig

Loss = Callable[["Tensor", "Tensor"], "Tensor"]  # (tokens, labels) -> mean loss


def hugging_face(rounds: Rounds, work: Workload, compile: bool = False, pure: bool = False) -> None:
    """transformers' model in a plain loop, whole if compiled.

    Args:
        rounds: as every arm.
        work: as every arm.
        compile: torch.compile the model.
        pure: bf16 weights and optimizer states.
    """
    import torch

    model = _hugging_face_model(work, rounds, torch.bfloat16 if pure else torch.float32)
    forward = torch.compile(model) if compile else model
    _plain_loop(rounds, work, model, _own_loss(forward), autocast=not pure)


def plain(rounds: Rounds, work: Workload, compile: bool = False) -> None:
    """Llama in a hundred lines of torch, in a plain loop."""
    import torch

    from tools.benchmarks.plain_llama import PlainLlama

    model: Any = PlainLlama(work.run().model, _weights(work)).to(rounds.device.torch_device)
    _plain_loop(rounds, work, model, torch.compile(model) if compile else model, autocast=True)


def fsdp2(rounds: Rounds, work: Workload, compile: bool = False) -> None:
    """transformers' model, each block under fully_shard, on a mesh of this one rank."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = rounds.device
    dist.init_process_group(device.backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.kind, (1,))
    kind = torch.bfloat16 if work.dtype == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    model = _hugging_face_model(work, rounds, torch.float32)
    for block in model.model.layers:
        if compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    _plain_loop(rounds, work, model, _own_loss(model), autocast=False)


def litgpt(rounds: Rounds, work: Workload, compile: bool = True) -> None:
    """litgpt's model and loss in the loop of its `pretrain` command, which compiles."""
    import torch
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    weights: dict[str, Any] = {}
    shape = work.run().model
    config = Config(
        block_size=shape.seq_length,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        n_query_groups=shape.num_key_value_heads,
        n_embd=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        rotary_percentage=1.0,
        rope_base=int(shape.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    copy_weights_hf_llama(config, {}, weights, _weights(work))
    model = GPT(config)
    model.load_state_dict(weights)
    model.to(rounds.device.torch_device)
    forward = torch.compile(model) if compile else model

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return chunked_cross_entropy(forward(tokens), labels)

    _plain_loop(rounds, work, model, loss, autocast=True)


def hugging_face_trainer(rounds: Rounds, work: Workload) -> None:
    """transformers' Trainer, with its own data loader; a callback ends the rounds."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    run = work.run()
    train, optimizer = run.train, run.optimizer

    class Samples(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for step in work.batches():
                for tokens, labels in step:
                    for sample, label in zip(tokens, labels, strict=True):
                        yield {"input_ids": sample, "labels": label, "shift_labels": label}

    class OwnTrainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.seen = super().training_step(*args, **kwargs)
            return self.seen

    class AfterStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = not rounds.done(trainer.seen)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            max_steps=10**6,
            optim="adamw_torch_fused",
            learning_rate=optimizer.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_epsilon=optimizer.adam_eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.clip_grad,
            bf16=work.dtype == "bf16",
            use_cpu=rounds.device.kind == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = _hugging_face_model(work, rounds, torch.float32)
        trainer = OwnTrainer(model=model, args=arguments, train_dataset=Samples())
        # The count of tokens that it would divide by leaves out one label a sample, as if labels
        # were still to be shifted.
        trainer.model_accepts_loss_kwargs = False
        trainer.add_callback(AfterStep())
        if rounds.wait():
            trainer.train()


def _weights(work: Workload) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    from safetensors.torch import load_file

    assert work.weights is not None
    files = sorted(work.weights.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def _hugging_face_model(work: Workload, rounds: Rounds, kind: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        work.weights, dtype=kind, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model.to(rounds.device.torch_device).train()


def _own_loss(model: Any) -> Loss:
    """The loss that transformers computes beside the logits; `labels` are shifted already."""

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        return found

    return loss


def _plain_loop(
    rounds: Rounds, work: Workload, model: nn.Module, loss_of: Loss, *, autocast: bool
) -> None:
    """Forward, backward, clip, fused AdamW; gradients accumulate in the parameters' type."""
    import torch

    run, on = work.run(), rounds.device.torch_device
    steps = run.train.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(
        _groups(model.parameters(), run),
        lr=run.optimizer.learning_rate,
        betas=(run.optimizer.adam_beta1, run.optimizer.adam_beta2),
        eps=run.optimizer.adam_eps,
        fused=True,
    )
    batches, wanted = work.batches(), rounds.wait()
    while wanted:
        total = torch.zeros((), device=on)
        for tokens, labels in next(batches):
            with _autocast(rounds, work, autocast):
                loss = loss_of(tokens.to(on, non_blocking=True), labels.to(on, non_blocking=True))
            (loss / steps).backward()
            total += loss.detach() / steps
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wanted = rounds.done(total)


def _groups(parameters: Iterable[nn.Parameter], run: RunConfig) -> list[dict[str, Any]]:
    """Matrices are decayed, norms are not: as in our runs."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": run.optimizer.weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _autocast(rounds: Rounds, work: Workload, wanted: bool) -> contextlib.AbstractContextManager:
    import torch

    if not wanted or work.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(rounds.device.kind, dtype=torch.bfloat16)

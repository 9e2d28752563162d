"""A resolved configuration, for tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config import schema


def tiny_run(folder: Path, **log: Any) -> schema.RunConfig:
    """One process, three layers; `log` changes the log section."""
    return schema.RunConfig(
        model=schema.ModelShape(
            model_arch="debug",
            num_layers=3,
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            ffn_hidden_size=96,
            seq_length=8,
            init_method_std=0.02,
            vocab_size=100,
        ),
        parallel=schema.ParallelConfig(tensor_parallel=1, world_size=1),
        train=schema.TrainConfig(
            micro_batch_size=2,
            gradient_accumulation_steps=2,
            global_batch_size=4,
            train_iters=100,
            train_tokens=3200,
            dtype="fp32",
        ),
        optimizer=schema.OptimizerConfig(lr_decay_iters=100),
        data=schema.DataConfig(data_file_list="builtin", tokenizer_type="BuiltinTokenizer"),
        checkpoint=schema.CheckpointConfig(run_name=folder.name, run_dir=str(folder)),
        stability=schema.StabilityConfig(),
        log=schema.LogConfig(**log),
        launch=schema.LaunchConfig(num_hosts=1, devices_per_host=0),
    )

#!/usr/bin/env python3
"""Hugging Face's Trainer on our model and our samples: a run's folder that compare_runs takes.

    MODEL_ARCH=debug python3 tools/hf_trainer.py --output_dir=runs/hf [--max_steps=100 ...]
    python3 tools/hf_trainer.py --like runs/ours --output_dir=runs/hf
    python3 tools/hf_trainer.py --model_name_or_path=EXPORT --block_size=8192 --bf16=true ...
    python3 -m megatron.launch -n 8 -- python3 tools/hf_trainer.py --fsdp=auto_wrap ...

Flags are those of Hugging Face's scripts; variables and other flags are those of train_alcf.sh. It
begins with the weights of our run, or with those of --model_name_or_path, and takes the same
samples at each step, by the same learning rates; --dataset_name NAME [--streaming] reads text
instead. Status: 0; 2 wrong setting; 3 wrong data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.analysis.comparing.compared_run import is_run
from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RUN_FILE, RunConfig
from megatron.data.prepare.tokenizer import build_tokenizer
from megatron.launch.ranks import Ranks, find_ranks, rendezvous
from megatron.launch.start import configuration
from megatron.launch.starts import accept
from megatron.parallel.control import ALONE
from megatron.training import log
from megatron.training.device import Device, detect, prepare
from megatron.training.loggers import make_tracker
from megatron.training.run_data import Data, build_data
from tools.hf_training.hf_flags import HfFlags, divide, typed_for
from tools.hf_training.hf_model import hugging_face_model, require_unsharded, shape_settings
from tools.hf_training.hf_samples import NumberedSamples, StreamedText

NEEDED = {"accelerate": "1.15.0"}


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Trains; returns the exit status."""
    if not argv or "--help" in argv:
        print(__doc__)
        return 0
    try:
        require_packages()
        flags = divide(argv)
        with configuration(settings(flags, environ), flags.rest) as (run, config):
            require_unsharded(run)
            ranks = find_ranks(environ)
            if ranks.rank == 0 and is_run(run.run_folder):  # the others may come after its start
                raise ConfigError(f"{run.run_folder} holds a run: choose another --output_dir")
            if ranks.world_size > 1:
                os.environ.update(torch_variables(ranks, environ))
            train(run, flags, ranks, config)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def require_packages() -> None:
    """Looks for what only this tool needs.

    Raises:
        ConfigError: it is missing; says what to install.
    """
    from importlib.util import find_spec

    for name, version in NEEDED.items():
        if find_spec(name) is None:
            raise ConfigError(f"Hugging Face's Trainer needs {name}: pip install {name}=={version}")


def torch_variables(ranks: Ranks, environ: Mapping[str, str]) -> dict[str, str]:
    """What accelerate reads of its place, and mpiexec and srun do not set."""
    host, _, port = rendezvous(environ).removeprefix("tcp://").rpartition(":")
    return {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.local_rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "MASTER_ADDR": host.strip("[]"),
        "MASTER_PORT": port,
    }


def settings(flags: HfFlags, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with what the flags set; W&B only where --report_to asks for it."""
    like, model = flags.own.get("like"), flags.own.get("model_name_or_path")
    found = {**environ, "WANDB_MODE": "disabled"}
    found |= typed_for(Path(like)) if like else {}
    found |= shape_settings(Path(model)) if model else {}
    if flags.fsdp:
        found["ZERO_STAGE"] = "3"  # what it amounts to
    return found | flags.settings


def train(run: RunConfig, flags: HfFlags, ranks: Ranks, config: Path | None) -> None:
    """One run, from its configuration to its last step."""
    log.setup(ranks.rank, run.log.log_level)
    device = detect(ranks.local_rank, run.train.dtype, run.launch.device)
    prepare(device, run.train.dtype)
    data = build_data(run, ALONE)
    if ranks.rank == 0 and config:
        accept(config, run.run_folder)
        _describe(run, flags, data)
    tracker = make_tracker(run, logs=ranks.rank == 0, iteration=0)
    try:
        _train(run, flags, data, device, tracker)
    finally:
        tracker.close()


def _train(run: RunConfig, flags: HfFlags, data: Data, device: Device, tracker: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    from tools.hf_training.recorded_trainer import Journal, RecordedTrainer

    folder = flags.own.get("model_name_or_path")
    journal = Journal(run, device, tracker)
    training, evaluation = _samples(run, flags, data)
    trainer = RecordedTrainer(
        journal,
        model=hugging_face_model(run, Path(folder) if folder else None),
        args=training_arguments(run, flags, device),
        train_dataset=training,
        eval_dataset=evaluation,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except Exception as error:
        journal.event("stop", reason=f"{type(error).__name__}: {error}".partition("\n")[0])
        raise
    journal.event("stop", reason="finished")


def training_arguments(run: RunConfig, flags: HfFlags, device: Device) -> Any:
    """Our settings as Hugging Face's."""
    from transformers import TrainingArguments

    optimizer, train = run.optimizer, run.train
    if optimizer.optimizer not in ("adamw", "sgd"):
        raise ConfigError(f"OPT={optimizer.optimizer}: Hugging Face's Trainer has adamw and sgd")
    wanted: dict[str, Any] = {"fsdp": True} if flags.fsdp else {}
    if train.activation_checkpointing != "0":
        wanted["gradient_checkpointing"] = True
    return TrainingArguments(
        output_dir=str(run.run_folder / "huggingface"),
        max_steps=train.train_iters,
        per_device_train_batch_size=train.micro_batch_size,
        per_device_eval_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_epsilon=optimizer.adam_eps,
        max_grad_norm=optimizer.clip_grad,
        optim={"adamw": "adamw_torch", "sgd": "sgd"}[optimizer.optimizer],
        bf16=train.dtype == "bf16",
        fp16=train.dtype == "fp16",
        seed=train.seed,
        use_cpu=device.kind == "cpu",
        save_strategy="no",  # these three are decided by our settings, in Journal
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **wanted,
    )


def _samples(run: RunConfig, flags: HfFlags, data: Data) -> tuple[Any, Any]:
    """Training and evaluation samples; of a stream, the first ones are the evaluation's."""
    wanted = int(flags.own.get("max_eval_samples", 0)) or 10**18
    evaluated = min(run.log.eval_iters * run.train.global_batch_size, wanted)
    name = flags.own.get("dataset_name")
    if name is None:
        assert data.splits.train is not None
        valid = data.splits.valid or data.splits.train
        return (
            NumberedSamples(data.splits.train, run.total_samples),
            NumberedSamples(valid, evaluated),
        )
    model = flags.own.get("model_name_or_path")
    encoder = data.tokenizer
    if model and (Path(model) / "tokenizer.json").is_file():
        encoder = build_tokenizer("HFTokenizer", model)
    seq = run.model.seq_length
    return (
        StreamedText(name, encoder, seq, evaluated, run.total_samples),
        StreamedText(name, encoder, seq, 0, evaluated),
    )


def _describe(run: RunConfig, flags: HfFlags, data: Data) -> None:
    """Into run.json: who trained, and on what, where that is not our data; beside it, our data."""
    path = run.run_folder / RUN_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    record["provenance"]["trainer"] = "transformers.Trainer" + (" with FSDP" if flags.fsdp else "")
    name = flags.own.get("dataset_name")
    if name:
        record["config"]["data"]["data_file_list"] = name
    else:
        stages = [{"record": data.record}]
        write_atomically(run.run_folder / "data.json", json.dumps(stages) + "\n")
    write_atomically(path, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], os.environ))

"""Flags of Hugging Face's training scripts as settings of ours.

`--block_size=8192`, `--block-size 8192` and a bare `--bf16` are all taken. What is in neither table
goes on as a flag of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.config.schema import RUN_FILE, by_variable, read_run

Setting = tuple[str, str]


def _is_on(text: str) -> bool:
    return text.lower() in ("true", "1", "yes", "on", "")


def _named(variable: str) -> Callable[[str], Setting]:
    return lambda text: (variable, text)


def _choice(variable: str, values: Mapping[str, str], flag: str) -> Callable[[str], Setting]:
    def setting(text: str) -> Setting:
        if text not in values:
            raise ConfigError(f"--{flag}={text}: one of {', '.join(values)}")
        return variable, values[text]

    return setting


OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "sgd": "sgd",
}  # fmt: skip
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant",
    "constant_with_warmup": "constant",
}  # fmt: skip
FLAGS: dict[str, Callable[[str], Setting]] = {
    "block_size": _named("SEQ"),
    "per_device_train_batch_size": _named("MICRO_BATCH"),
    "gradient_accumulation_steps": _named("GRAD_ACC_STEPS"),
    "max_steps": _named("TRAIN_ITERS"),
    "logging_steps": _named("LOG_INTERVAL"),
    "eval_steps": _named("EVAL_INTERVAL"),
    "save_steps": _named("SAVE_INTERVAL"),
    "learning_rate": _named("LR"),
    "weight_decay": _named("WEIGHT_DECAY"),
    "adam_beta1": _named("ADAM_BETA1"),
    "adam_beta2": _named("ADAM_BETA2"),
    "adam_epsilon": _named("ADAM_EPS"),
    "max_grad_norm": _named("CLIP_GRAD"),
    "warmup_steps": _named("LR_WARMUP_ITERS"),
    "warmup_ratio": _named("LR_WARMUP_FRAC"),
    "seed": _named("SEED"),
    "output_dir": _named("RUN_DIR"),
    "run_name": _named("RUN_NAME"),
    "optim": _choice("OPT", OPTIMIZERS, "optim"),
    "lr_scheduler_type": _choice("LR_DECAY_STYLE", SCHEDULES, "lr_scheduler_type"),
    "bf16": lambda text: ("DTYPE", "bf16" if _is_on(text) else "fp32"),
    "gradient_checkpointing": lambda text: (
        "USE_ACTIVATION_CHECKPOINTING",
        str(int(_is_on(text))),
    ),
    "report_to": lambda text: ("WANDB_MODE", "online" if text == "wandb" else "disabled"),
}
"""Hugging Face's flag -> our variable and its value."""

IMPLIED = {
    "do_train", "do_eval", "include_tokens_per_second", "include_num_input_tokens_seen",
    "include_for_metrics", "logging_first_step", "per_device_eval_batch_size",
    "overwrite_output_dir",
}  # fmt: skip
"""Taken, and always so here: training, evaluation, tokens, first step; evaluation in micro-batches
as in training."""

OWN = ("model_name_or_path", "fsdp", "dataset_name", "streaming", "max_eval_samples", "like")
SWITCHES = {"bf16", "gradient_checkpointing", "fsdp", "streaming", *IMPLIED}
"""Flags that may stand without a value."""


@dataclass(frozen=True)
class HfFlags:
    """A command line, divided.

    Attributes:
        settings: our variables.
        own: what is no setting of ours: flag -> text.
        rest: flags of ours.
    """

    settings: dict[str, str]
    own: dict[str, str]
    rest: list[str]

    @property
    def fsdp(self) -> bool:
        """Whether the weights are sharded."""
        return "fsdp" in self.own and self.own["fsdp"].lower() not in ("false", "0", "no")


def divide(argv: Sequence[str]) -> HfFlags:
    """Reads a command line.

    Raises:
        ConfigError: a flag without its value, or a value that has no counterpart here.
    """
    words, found = list(argv), HfFlags({}, {}, [])
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in {*FLAGS, *IMPLIED, *OWN}:
            found.rest.append(word)
            continue
        if not equals:
            bare = not words or words[0].startswith("--")
            if bare and name not in SWITCHES:
                raise ConfigError(f"{flag} needs a value")
            text = "" if bare else words.pop(0)
        if name in FLAGS:
            variable, value = FLAGS[name](text)
            found.settings[variable] = value
        elif name in OWN:
            found.own[name] = text
    return found


def typed_for(run_folder: Path) -> dict[str, str]:
    """The settings that a run was started with, without those of its folder and ranks.

    Raises:
        ConfigError: it has no run.json.
    """
    read_run(run_folder / RUN_FILE)  # says what is wrong with it
    record = json.loads((run_folder / RUN_FILE).read_text(encoding="utf-8"))
    origin = record["provenance"]
    left_out = {"RUN_DIR", "RUN_NAME", "WORLD_SIZE", "HOSTFILE", "LAUNCH_WITH", "SAVE", "LOAD"}
    names = by_variable().keys() - left_out
    typed = {k: v for k, v in origin.get("environment", {}).items() if k in names}
    if origin.get("command_line"):
        raise ConfigError(
            f"--like {run_folder}: it was started with flags, {' '.join(origin['command_line'])}: "
            "give them here as well, and its variables instead of --like"
        )
    return typed

"""Whether a start goes on with the experiment in its run's folder: compared before anything starts.

Refused is what the user set, now or then, and what makes other numbers. The layout, the ranks, and
a GLOBAL_BATCH that follows from them may change: else another node count began the run anew. The
length may grow. `--resume RUN` takes any change that is set beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config import batch, resumed, schema
from megatron.config.errors import ConfigError
from megatron.config.resumed import ResumedRun
from megatron.config.schema import RUN_FILE, RunConfig
from megatron.config.table import value_text

METRICS_FILE = "metrics.jsonl"
LENGTH = "model.seq_length"
LIST = "data.data_file_list"
DATA = ("data.order", "data.tokenizer_type", "data.tokenizer_model", LIST, LENGTH)
COMPARED = (
    "train.seed", "train.dtype", "train.float8", "train.grad_reduce_in_bf16",
    "train.rampup_batch_size",
    "data.eod_mask_loss", "data.reset_position_ids", "data.reset_attention_mask", *DATA,
)  # fmt: skip
"""What tells experiments apart, beside the sections `model` and `optimizer`."""
FREE = ("model.model_arch", "optimizer.lr_decay_iters")
"""Of these sections: a name for the integers beside it, and what follows from the length."""
LAYOUT = tuple(f"parallel.{axis}_parallel" for axis in ("tensor", "pipeline", "sequence"))
SHOWN = 8  # differences in a message
PEEKED = 64  # lines at the start of a metrics file


class Comparison(NamedTuple):
    """What differs from the run in the folder.

    Attributes:
        problem: why the start must not go on with it; None where it may.
        note: what changes without having been set; None where nothing does.
    """

    problem: str | None = None
    note: str | None = None


def compare(run: RunConfig, sources: Mapping[str, str]) -> Comparison:
    """Compare a start with what its run's folder holds.

    Args:
        run: the configuration of the start.
        sources: option key -> where its value came from.
    """
    if run.optimizer.lr_finder or not has_begun(
        run.run_folder, run.checkpoint_folder
    ):  # a search refuses checkpoints by itself
        return Comparison()
    try:
        before = resumed.read(str(run.run_folder), "RUN_DIR")
    except ConfigError:  # damaged: a checkpoint's manifest says the same again
        return Comparison()
    now = ResumedRun(run.run_folder, _values(run), sources)
    changed = [key for key in before.values if _differs(key, before, now)]
    causes, note = _batch(before, now)
    changed += causes
    return Comparison(_problem(run, changed, before, now) if changed else None, note)


def has_begun(folder: Path, checkpoints: Path) -> bool:
    """Whether steps were taken in a run's folder; a start that made none may be corrected."""
    if not (folder / RUN_FILE).is_file():
        return False
    if any(checkpoints.glob("step-*")):
        return True
    try:
        with (folder / METRICS_FILE).open(encoding="utf-8") as lines:
            return any('"step"' in line for line in islice(lines, PEEKED))
    except (OSError, ValueError):
        return False


def _values(run: RunConfig) -> dict[str, Any]:
    """Option key -> value."""
    sections = run.to_dict()
    split = ((key, *key.split(".")) for key in schema.by_key())
    return {key: sections[section][field] for key, section, field in split}


def _differs(key: str, before: ResumedRun, now: ResumedRun) -> bool:
    """Whether an option makes another experiment of the start."""
    section, old, new = key.partition(".")[0], before.values[key], now.values[key]
    compared = key in COMPARED or section in ("model", "optimizer")
    if old == new or not compared or key in FREE:
        return False
    if key in DATA and now.values["data.allow_data_change"]:
        return False
    if key == LIST and not _other_content(old, new):
        return False
    return section == "model" or before.was_set(key) or now.was_set(key)


def _other_content(old: str, new: str) -> bool:
    """Whether two data lists say different things; of one that is gone nobody knows."""
    try:
        return Path(old).read_bytes() != Path(new).read_bytes()
    except OSError:
        return "builtin" in (old, new)


def _batch(before: ResumedRun, now: ResumedRun) -> tuple[list[str], str | None]:
    """What the user set that changes GLOBAL_BATCH, or the note that it follows from the ranks."""
    old, new = (values.values.get(batch.GLOBAL) for values in (before, now))
    if old is None or old == new:
        return [], None
    if before.was_set(batch.GLOBAL) or now.was_set(batch.GLOBAL):
        return [batch.GLOBAL], None
    causes = [
        key
        for key in (batch.MICRO, batch.ACCUMULATION, *LAYOUT)
        if before.values.get(key) != now.values[key] and (before.was_set(key) or now.was_set(key))
    ]
    if causes:
        return [*causes, batch.GLOBAL], None
    ranks = _change("parallel.world_size", before, now)
    return [], (
        f"{_change(batch.GLOBAL, before, now)} follows from {ranks}, and the run goes on with it: "
        f"set GLOBAL_BATCH={old} to keep it"
    )


def _problem(run: RunConfig, changed: Sequence[str], before: ResumedRun, now: ResumedRun) -> str:
    """The refusal, with the line that begins anew and the one that goes on."""
    words = [_change(key, before, now) for key in changed]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    marks = [_mark(key, now) for key in changed if key != batch.GLOBAL or len(changed) == 1]
    suffix = "-".join(["", *marks])
    folder = run.run_folder
    name = (
        ("RUN_DIR", f"{folder}{suffix}")
        if run.checkpoint.run_dir
        else ("RUN_NAME", f"{run.checkpoint.run_name}{suffix}")
    )
    anew = [f"{name[0]}={name[1]}"]
    if run.checkpoint.save:
        anew.append(f"CKPT_DIR={run.checkpoint.save}{suffix}")
    same_model = not any(key.startswith("model.") and key != LENGTH for key in changed)
    changing = ", or with it beside your settings to change the run" if same_model else ""
    data = "; ALLOW_DATA_CHANGE=1 begins a new data stage" if set(changed) & set(DATA) else ""
    return (
        f"{folder} holds another experiment: {', '.join(words[:SHOWN])}{more}. To begin a "
        f"new run, add {' '.join(anew)}. To go on with that run as it is, start it with "
        f"`--resume {folder}` and without these settings{changing}{data}."
    )


def _change(key: str, before: ResumedRun, now: ResumedRun) -> str:
    old, new = (value_text(values.values.get(key), "unset") for values in (before, now))
    return f"{_name(key, now)} {old} -> {new}"


def _mark(key: str, now: ResumedRun) -> str:
    """A setting in a run's name."""
    value = now.values[key]
    text = Path(value).stem if key == LIST else value_text(value, "off")
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{_name(key, now).lower()}{text}")


def _name(key: str, now: ResumedRun) -> str:
    """An option as the user has set it, else its canonical name."""
    option, source = schema.by_key()[key], now.sources.get(key)
    return source if source in option.env else option.name

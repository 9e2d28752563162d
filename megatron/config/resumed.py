"""`--resume RUN`: the configuration that a run has, as settings of the start that resumes it.

It stands between what the user sets now and the presets. What the user had set counts as set again,
presets and defaults stay as they were then, and what followed from others is derived anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import batch, schedule_lengths, schema
from megatron.config.errors import ConfigError
from megatron.config.labels import LABELLED
from megatron.config.option import Draft, Option
from megatron.config.reference_flags import RENAMED, SHORTHANDS
from megatron.config.schema import RUN_FILE, RunConfig
from megatron.config.table import value_text

RESUME, NAME, FOLDER = "checkpoint.resume", "checkpoint.run_name", "checkpoint.run_dir"
ARCH = "model.model_arch"

# Not of a run but of one start of it.
_OF_A_START = (RESUME, FOLDER, "log.dry_run")

# Of each row one is set: what the user sets now takes the place of the run's.
_ALTERNATIVES = (
    tuple(batch.LENGTHS),
    (schedule_lengths.FRACTION, *schedule_lengths.WARMUPS),
    schedule_lengths.DECAYS,
    ("data.data", "data.data_file_list"),
)

# Sizes of the batch that give way to GLOBAL_BATCH, which stays.
_ADAPTS = (batch.MICRO, batch.ACCUMULATION)


@dataclass(frozen=True)
class ResumedRun:
    """A run's configuration.

    Attributes:
        folder: the run's.
        values: option key -> value, None where it is off; an older version's lacks some.
        sources: option key -> where the value came from.
    """

    folder: Path
    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def was_set(self, key: str) -> bool:
        """Whether its user had set this option, by a variable or a flag."""
        option, source = schema.by_key()[key], self.sources.get(key, "")
        others = {**SHORTHANDS, **RENAMED}
        own = (*option.env, *option.flags, *(f for f, (to, _) in others.items() if to == key))
        split = source == "--split" and key.endswith("_split")
        return source in own or split or source == LABELLED

    def was_derived(self, key: str) -> bool:
        """Whether it followed from other values, or from where the ranks ran."""
        source = self.sources.get(key, "default")
        usual = source == "default" or source.startswith(("preset ", "machine "))
        return not self.was_set(key) and (not usual or key.startswith("launch."))


def read(given: str, name: str) -> ResumedRun:
    """The run that the user names.

    Args:
        given: its folder, or its name under runs/.
        name: the variable or flag that names it.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    places = [Path(given), Path("runs") / given]
    folder = next((place for place in places if (place / RUN_FILE).is_file()), None)
    if folder is None:
        known = sorted(path.parent.name for path in Path("runs").glob(f"*/{RUN_FILE}"))
        more = f" Runs here: {', '.join(known[:8])}" if known else ""
        raise ConfigError(
            f"{name}={given} is not a run: neither {places[0]} nor {places[1]} holds {RUN_FILE}."
            f"{more}"
        )
    path = folder / RUN_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        lines = [line.partition(": ") for line in record.get("sources", [])]
        stored = {
            f"{section}.{field}": value
            for section, fields in record["config"].items()
            if isinstance(fields, dict)
            for field, value in fields.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name}={given}: {path} cannot be read: {error!r}") from None
    values = {
        key: _checked(option, stored[key], path)
        for key, option in schema.by_key().items()
        if key in stored
    }
    return ResumedRun(folder, values, {key: source for key, _, source in lines})


_KINDS: dict[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (float, int), "str": (str,),
}  # fmt: skip


def _checked(option: Option, value: Any, path: Path) -> Any:
    """A stored value, of the option's kind, or None."""
    if value is None:
        return None
    is_other = isinstance(value, bool) and option.kind != "bool"  # a bool is an int, too
    if is_other or not isinstance(value, _KINDS[option.kind]):
        raise ConfigError(f"{path}: {option.key} is {value!r}, which is no {option.kind}")
    return option.checked(value, f"{path}: {option.name}")


def fill(draft: Draft, run: ResumedRun) -> None:
    """Add a run's configuration to what the user has set.

    Raises:
        ConfigError: the user has set another folder for the run.
    """
    _fill_folder(draft, run)
    set_aside = {
        key for row in _ALTERNATIVES if draft.given.keys() & set(row) for key in row
    } - draft.given.keys()
    if "data.tokenizer_type" in draft.given:
        set_aside.add("data.tokenizer_model")
    if run.was_set(batch.ITERS):  # TRAIN_TOKENS said the same, unless the batch changes
        set_aside.add(batch.TOKENS)
    if ARCH in draft.given and draft.get(ARCH) != run.values.get(ARCH):
        set_aside |= {key for key in run.values if run.sources.get(key, "").startswith("preset ")}
    if run.values.get(batch.GLOBAL):
        draft.give(batch.GLOBAL, run.values[batch.GLOBAL], schema.by_key()[batch.GLOBAL].name)
    for key, value in run.values.items():
        derived = run.was_derived(key) and key not in _ADAPTS
        if value is None or derived or key in set_aside or key in _OF_A_START:
            continue
        if run.was_set(key) and key not in _ADAPTS:
            draft.give(key, value, run.sources[key])
        else:
            draft.fill(key, value, run.sources.get(key, "default"))


def _fill_folder(draft: Draft, run: ResumedRun) -> None:
    """The run's folder stays the one that the user named."""
    name = run.values.get(NAME) or run.folder.absolute().name
    stored = Path(run.values.get(FOLDER) or Path("runs") / name)
    for key, chosen in ((NAME, Path("runs") / str(draft.get(NAME))), (FOLDER, draft.get(FOLDER))):
        if key in draft.given and Path(chosen).resolve() != run.folder.resolve():
            raise ConfigError(
                f"{draft[RESUME]} resumes {run.folder}, but {draft[key]} is another folder: unset "
                f"{draft[key].name}, or unset {draft[RESUME].name} to start a new run"
            )
    draft.fill(NAME, name, run.sources.get(NAME, "default"))
    if stored.resolve() == run.folder.resolve():
        draft.fill(FOLDER, run.values.get(FOLDER), run.sources.get(FOLDER, "default"))
    else:  # it was moved
        draft.fill(FOLDER, str(run.folder), draft[RESUME].name)


def changes(before: ResumedRun, after: RunConfig, sources: Mapping[str, str]) -> str:
    """What the start changes, in a line: `NAME old -> new`, with the source of what follows."""
    now = after.to_dict()
    words = []
    for key, old in before.values.items():
        section, _, field = key.partition(".")
        option, new, source = schema.by_key()[key], now[section][field], sources.get(key, "")
        if key not in _OF_A_START and old != new:
            text = f"{option.name} {value_text(old, 'unset')} -> {value_text(new, 'unset')}"
            own = source in (*option.env, *option.flags)
            words.append(text if own else f"{text} ({source})")
    return ", ".join(words) or "nothing"


def value_set(given: str, name: str, key: str) -> str | None:
    """What the user of a run had set an option to; None where it was not set."""
    run = read(given, name)
    return str(run.values[key]) if run.values.get(key) and run.was_set(key) else None

"""Environment and command line -> one frozen RunConfig, or an error that names what to change.

Precedence: flag > variable > the run of --resume > MODEL_ARCH preset > machine default > default.
An empty variable is unset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.config import (
    batch,
    experiment,
    flags,
    hints,
    presets,
    resumed,
    rope_scaling,
    schedule_lengths,
    schema,
    skip,
    strays,
    text_settings,
    update_rules,
    validate,
)
from megatron.config.errors import ConfigError
from megatron.config.foreign_variables import SWITCHES
from megatron.config.labels import label, with_labels
from megatron.config.option import Draft
from megatron.config.schema import SECTIONS, RunConfig
from megatron.config.tokenizer_settings import fill_tokenizer
from megatron.data import data_list
from megatron.data import survey as data_survey
from megatron.data.hub_names import require_data_set

ARCH, DTYPE = "model.model_arch", "train.dtype"
FINDER = "optimizer.lr_finder"
# A search is short and raises the rate until the loss breaks away, which is no fault.
FINDER_DEFAULTS = {
    batch.ITERS: 200,
    "optimizer.learning_rate": 1.0,
    "optimizer.min_learning_rate": 0.0,
    "stability.spike_policy": "off",
    "stability.max_bad_steps": 0,
    "log.eval_interval": 0,
}
HELD_OUT = "data.valid_data_file_list", "data.test_data_file_list"


@dataclass(frozen=True)
class Site:
    """Properties of a machine that defaults depend on.

    Attributes:
        machine: name of the machine.
        is_hpc: a known HPC machine: its defaults are those of production runs.
        num_hosts: hosts of the job.
        devices_per_host: accelerators per host; 0: none.
        defaults: variable -> value that this machine prefers.
        device_gib: memory of an accelerator in GiB; 0: not known, or there is none.
        in_job: a scheduler's job, whose warnings nobody reads in time.
        slow_types: DTYPE -> why it is slow here; accelerators have none.
    """

    machine: str = "generic"
    is_hpc: bool = False
    num_hosts: int = 1
    devices_per_host: int = 0
    defaults: Mapping[str, str] = field(default_factory=dict)
    device_gib: float = 0.0
    in_job: bool = False
    slow_types: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A complete configuration and where it came from.

    Attributes:
        sources: option key (`section.field`) -> where its value came from.
        warnings: what the user probably did not mean.
        notes: what the user should know.
        device_gib: memory of an accelerator in GiB; 0: not known, or the ranks use none.
        in_vain: those warnings that say that a variable was meant and is not read.
    """

    run: RunConfig
    sources: dict[str, str]
    warnings: list[str]
    notes: list[str]
    device_gib: float = 0.0
    in_vain: tuple[str, ...] = ()


def resolve(environ: Mapping[str, str], argv: Sequence[str], site: Site) -> Resolved:
    """Make the configuration of a run.

    Args:
        environ: the environment's variables.
        argv: the command line without the program's name.
        site: the machine.

    Raises:
        ConfigError: where a setting is wrong.
        DataError: where data is missing or wrong; not in a dry run, which shows it instead.
    """
    draft, notes = _given(environ, argv)
    before = _fill_resumed(draft)
    if draft.get(FINDER):
        for key, value in FINDER_DEFAULTS.items():
            draft.fill(key, value, "LR_FINDER")
    _fill_defaults(draft, site)
    _fill_world(draft, site)
    notes += fill_tokenizer(draft, environ, before)
    validate.require(draft, validate.LAYOUT_CHECKS)
    batch.resolve_batch(draft, draft.get(validate.WORLD) // validate.model_parallel_size(draft))
    validate.require(draft, (batch.check_rampup,))
    batch.resolve_train_iters(draft)
    schedule_lengths.resolve_schedule(draft)
    _fill_derived(draft)
    types = _fill_type(draft, site)
    validate.require(draft, validate.FINAL_CHECKS)
    run = _build(draft, site)
    if before:
        changes = resumed.changes(before, run, draft.sources)
        notes.append(f"resumes {before.folder} with its own configuration; changed: {changes}")
    named = strays.found(environ, run.launch.ignore_variables)
    warnings = [stray.text for stray in named] + hints.warnings(run, draft.given)
    (warnings if run.train.dtype in site.slow_types else notes).extend(types)
    if before is None:
        _compare_experiments(run, draft, warnings, notes)
    if run.log.dry_run:
        warnings += _stops(run, named if site.in_job else [])
    else:
        if site.in_job:
            strays.require_none(named)
        if own := text_settings.of_run(run):
            require_data_set(own.given, environ)
        _require_ready(run, draft, site)
    device_gib = 0.0 if run.launch.device == "cpu" else site.device_gib
    return Resolved(
        run,
        draft.sources,
        warnings,
        notes + hints.notes(run),
        device_gib,
        tuple(stray.text for stray in named if stray.in_vain),
    )


def _given(environ: Mapping[str, str], argv: Sequence[str]) -> tuple[Draft, list[str]]:
    """What the user set, flags before variables, and the command line's notes."""
    draft, problems = Draft(schema.by_key()), []
    line = flags.read_command_line(argv)
    problems += line.problems
    flagged = with_labels(line.settings)
    problems += _give_all(draft, flagged)
    variables = [
        (option.key, environ[name], name)
        for option in schema.options()
        for name in option.env
        if environ.get(name, "").strip()
    ]
    variables += [
        (*setting, name)
        for name, setting in SWITCHES.items()
        if environ.get(name, "").strip() not in ("", "0")
    ]
    given = [setting for setting in with_labels(variables) if setting[0] not in draft.given]
    problems += _give_all(draft, given)
    if problems:
        raise ConfigError("\n".join(problems))
    return draft, [*line.notes, *update_rules.notes([*flagged, *given])]


def _give_all(draft: Draft, settings: Sequence[tuple[str, str, str]]) -> list[str]:
    """Add (key, text, name) settings of one kind; returns the errors."""
    problems = []
    for key, text, name in settings:
        try:
            value = schema.by_key()[key].parse(text, name)
            if key == ARCH:
                value = presets.find(value, name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if key in draft.given and draft.get(key) != value:
            problems.append(
                f"{draft[key]} and {name}={text} set the same option to different values: "
                "unset one of them"
            )
        draft.give(key, value, name)
    return problems


def _fill_resumed(draft: Draft) -> resumed.ResumedRun | None:
    """The configuration of the run that is resumed; the option itself ends here."""
    if resumed.RESUME not in draft.given:
        return None
    run = resumed.read(draft.get(resumed.RESUME), draft.given[resumed.RESUME])
    resumed.fill(draft, run)
    draft.replace(resumed.RESUME, None, "is in the other options")
    return run


def _fill_defaults(draft: Draft, site: Site) -> None:
    """Preset, machine and schema defaults, in this order."""
    machine = {
        option.key: (option.parse(text, f"{site.machine}: {name}"), f"machine {site.machine}")
        for name, text in site.defaults.items()
        if text.strip() and (option := schema.by_variable()[name])
    }
    draft.fill(ARCH, *machine.get(ARCH, (None, "")))
    draft.fill(ARCH, "7B" if site.is_hpc else "debug", f"machine {site.machine}")
    arch = draft.values[ARCH] = presets.find(draft.get(ARCH))
    for name, value in presets.PRESETS[arch].values.items():
        draft.fill(schema.by_variable()[name].key, value, f"preset {arch}")
    for key, (value, source) in machine.items():
        draft.fill(key, value, source)
    draft.fill(validate.TP, 1, "default")
    lists = Path("ALCF") / "data-lists" / site.machine / "dolma.txt"
    usual = str(lists) if site.is_hpc else data_list.BUILTIN
    draft.fill("data.data_file_list", usual, f"machine {site.machine}")
    for option in schema.options():
        draft.fill(option.key, option.default, "default")


def _fill_world(draft: Draft, site: Site) -> None:
    """Hosts, ranks per host, and the total number of ranks."""
    hosts, ranks = "launch.num_hosts", "launch.devices_per_host"
    draft.fill(hosts, site.num_hosts, f"machine {site.machine}")
    if site.devices_per_host:
        draft.fill(ranks, site.devices_per_host, f"machine {site.machine}")
    if draft.get(ranks):
        total = draft.get(hosts) * draft.get(ranks)
        source = f"NHOSTS {draft.get(hosts)} x NGPU_PER_HOST {draft.get(ranks)}"
        draft.fill(validate.WORLD, total, source)
    draft.fill(validate.WORLD, validate.model_parallel_size(draft), "TP x PP x SP")
    if not draft.get(ranks):
        fewest = -(-draft.get(validate.WORLD) // draft.get(hosts))
        draft.replace(ranks, fewest, "WORLD_SIZE / NHOSTS")


def _fill_derived(draft: Draft) -> None:
    """Fill values that follow from others."""
    hidden, seq = draft.get("model.hidden_size"), draft.get("model.seq_length")
    draft.fill("model.init_method_std", math.sqrt(2 / (5 * hidden)), "sqrt(2 / (5 HIDDEN))")
    scaling, ranges = "model.rope_scaling", "data.train_range_to_skip"
    if draft.get(scaling):
        draft.values[scaling] = rope_scaling.canonical(draft.get(scaling), draft[scaling].name)
    if draft.get(ranges):
        merged = skip.parse_ranges(draft.get(ranges), draft[ranges].name)
        draft.values[ranges] = skip.ranges_text(merged) or None
    least, rate = "optimizer.min_learning_rate", draft.get("optimizer.learning_rate")
    if draft.sources[least].startswith("preset ") and draft.get(least) > rate:
        draft.replace(least, rate / 10, "LR / 10: the preset's is above LR")
    model = label(draft.get(ARCH), draft.get)
    stem = Path(draft.get("data.data_file_list")).stem
    stem += "-lr-finder" if draft.get(FINDER) else ""  # a later run must not take it for its own
    draft.fill("checkpoint.run_name", f"{model}-seq{seq}-{stem}", "<label>-seq<SEQ>-<data list>")


def _fill_type(draft: Draft, site: Site) -> list[str]:
    """DTYPE: the user's, else that of the run in the folder, else one that the device is fast at.

    Returns:
        What to say of it.
    """
    slow, chosen = site.slow_types, f"machine {site.machine}: its CPU has no fast bf16"
    if "bf16" in slow:
        draft.fill(DTYPE, "fp32", chosen)
    draft.fill(DTYPE, "bf16", "default")
    usual, said = draft.get(DTYPE), []
    if DTYPE not in draft.given:
        kept = _type_in_folder(draft)
        if kept not in (None, usual):
            draft.replace(DTYPE, kept, "the run's own")
            said.append(f"DTYPE={kept}, as in this run so far; here the default is {usual}")
        elif "bf16" in slow and draft.sources[DTYPE] == chosen:
            said.append(f"DTYPE={usual}, since bf16 is slow here: {slow['bf16']}")
    if draft.get(DTYPE) in slow:
        said.append(f"{draft[DTYPE]}: {slow[draft.get(DTYPE)]}")
    return said


def _type_in_folder(draft: Draft) -> str | None:
    """DTYPE that the run in the folder took by default; one that was set is compared later."""
    name, folder = draft.get("checkpoint.run_name"), draft.get("checkpoint.run_dir")
    own = Path(folder or Path("runs") / name)
    if not experiment.has_begun(own, Path(draft.get("checkpoint.save") or own / "checkpoints")):
        return None
    try:
        before = resumed.read(str(own), "RUN_DIR")
    except ConfigError:  # damaged: a checkpoint's manifest says the same again
        return None
    return None if before.was_set(DTYPE) else before.values.get(DTYPE)


def _build(draft: Draft, site: Site) -> RunConfig:
    """The frozen value of a complete draft."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for option in schema.options():
        section, _, name = option.key.partition(".")
        sections[section][name] = draft.get(option.key)
        draft.sources.setdefault(option.key, "not set")
    return RunConfig(
        **{name: SECTIONS[name](**values) for name, values in sections.items()},
        machine=site.machine,
    )


def _compare_experiments(
    run: RunConfig, draft: Draft, warnings: list[str], notes: list[str]
) -> None:
    """Refuse to go on with another experiment that is in the run's folder; a dry run says so."""
    comparison = experiment.compare(run, draft.sources)
    if comparison.problem and not run.log.dry_run:
        raise ConfigError(comparison.problem)
    if comparison.problem:
        warnings.append(f"a real run would stop here with status 2: {comparison.problem}")
    if comparison.note:
        notes.append(comparison.note)


def _stops(run: RunConfig, named: Sequence[strays.Stray]) -> list[str]:
    """What a dry run knows to stop a real one: variables in vain in a job, LOAD that is not there.

    A run that has checkpoints of its own may go on without LOAD.
    """
    stops = []
    try:
        strays.require_none(named)
    except ConfigError as error:
        stops.append(f"a real run would stop here with status 2: {str(error).splitlines()[-1]}")
    own = run.checkpoint_folder / "latest"
    if run.checkpoint.load and not run.load_folder.exists() and not own.exists():
        stops.append(
            f"a real run would stop here with status 4: LOAD={run.checkpoint.load} does not exist "
            f"(working folder {Path.cwd()})"
        )
    return stops


def _require_ready(run: RunConfig, draft: Draft, site: Site) -> None:
    """What only a real run needs: a device per rank, and data."""
    devices = run.launch.num_hosts * run.launch.devices_per_host
    if site.devices_per_host and run.parallel.world_size > devices:
        raise ConfigError(
            f"{draft[validate.WORLD]} ranks need one device each, but "
            f"NHOSTS={run.launch.num_hosts} x NGPU_PER_HOST={run.launch.devices_per_host} = "
            f"{devices}. Set WORLD_SIZE={devices} or less"
        )
    survey_of(run, draft["data.data_file_list"].name).require()


def survey_of(run: RunConfig, name: str = "DATA_FILE_LIST") -> data_survey.DataSurvey:
    """The corpora of a run and everything that is wrong with them."""
    data = run.data
    if text_settings.of_run(run):
        return data_survey.DataSurvey((), ())  # to be prepared: nothing is known yet
    train_share = data.train_split / (data.train_split + data.valid_split + data.test_split)
    survey = data_survey.survey_data(
        data.data_file_list,
        run.train.train_tokens,
        train_share,
        run.model.seq_length,
        name,
        data.order,
    )
    for key in HELD_OUT:
        path = getattr(data, key.partition(".")[2])
        if path is not None:  # what it lacks; its tokens are not the run's
            own = data_survey.survey_data(
                path, 0, 1.0, run.model.seq_length, schema.by_key()[key].name
            )
            survey = survey._replace(problems=(*survey.problems, *own.problems))
    if data.data_file_list == data_list.BUILTIN and data.tokenizer_type != "BuiltinTokenizer":
        problem = (
            f"TOKENIZER_TYPE={data.tokenizer_type} does not fit {name}={data_list.BUILTIN}, which "
            "has its own tokenizer: unset TOKENIZER_TYPE and TOKENIZER_MODEL, or give your own "
            f"{name}"
        )
        return survey._replace(problems=(*survey.problems, problem))
    return survey

"""A resolved configuration as text: the ARCHITECTURE box, and what a dry run prints."""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron.config import pipeline_stages as stages
from megatron.config import schema, skip, text_settings
from megatron.config.deepspeed import deepspeed_config, engine_zero_stage
from megatron.config.resolve import Resolved, survey_of
from megatron.config.schema import RunConfig
from megatron.config.table import value_text
from megatron.data import data_list
from megatron.data import survey as data_survey
from megatron.data.own_text import prepared_text
from megatron.plan.fit import verdict
from megatron.plan.memory import GIB, memory_per_rank

SHARDED = {
    1: "ZeRO 1: optimizer states",
    2: "ZeRO 2: optimizer states and gradients",
    3: "ZeRO 3: optimizer states, gradients and parameters",
}


def architecture_box(run: RunConfig) -> str:
    """The box that every log has before its first step; the order of its fields is fixed."""
    parallel, train, model = run.parallel, run.train, run.model
    fields = {
        "MODEL_ARCH": run.label,
        "PARAMS": run.parameters,
        "TP": parallel.tensor_parallel,
        "PP": parallel.pipeline_parallel,
        "SP": parallel.sequence_parallel,
        "DP": run.data_parallel,
        "ZERO": parallel.zero_stage,
        "MBS": train.micro_batch_size,
        "GAS": train.gradient_accumulation_steps,
        "GBS": train.global_batch_size,
        "NLAYERS": model.num_layers,
        "HIDDEN": model.hidden_size,
        "HEADS": model.num_attention_heads,
        "SEQ": model.seq_length,
        "FFN_HIDDEN_SIZE": model.ffn_hidden_size,
        "NUM_KV_HEAD": model.num_key_value_heads,
        "USE_ACTIVATION_CHECKPOINTING": train.activation_checkpointing,
        "DTYPE": train.dtype,
        "OPT": run.optimizer.optimizer,
    }
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return "\n".join(["==== ARCHITECTURE ====", *lines, "======================"])


def resolved_table(resolved: Resolved) -> str:
    """Every option with its value, and where it came from if it is not the default."""
    values = resolved.run.to_dict()
    rows = [("option", "value", "from (blank: default, - not set)")]
    for option in schema.options():
        section, _, field = option.key.partition(".")
        source = resolved.sources[option.key]
        shown = "" if source in ("default", "not set") else source
        rows.append((option.name, value_text(values[section][field], "-"), shown))
    return _columns(rows)


def memory_text(run: RunConfig, device_gib: float = 0.0) -> str:
    """The memory estimate by part, and whether it fits a device; 0 GiB: nobody knows."""
    estimate = memory_per_rank(run)
    rows = [(part, f"{size / GIB:.3f} GiB") for part, size in estimate._asdict().items()]
    table = _columns([*rows, ("total", f"{estimate.total / GIB:.3f} GiB")])
    if estimate.activations == 0:
        table += "\nthe peak is the reduction of the gradients, when activations are freed"
    known = verdict(run, device_gib) if device_gib else ["the memory of a device is not known here"]
    return "\n".join([table, *known])


def stages_text(run: RunConfig) -> str:
    """The pipeline stages: layers and cost of each, and how long they idle."""
    parallel = run.parallel
    if parallel.pipeline_parallel == 1:
        return ""
    blocks, bounds = run.stage_blocks, stages.stage_bounds(run.stage_blocks)
    costs = stages.stage_costs(blocks, *run.layer_costs)
    rows = [("stage", "rank", "layers", "cost", "")]
    for stage, (count, cost) in enumerate(zip(blocks, costs, strict=True)):
        ends = (["embedding"] if stage == 0 else []) + [f"{count} blocks"]
        ends += ["norm, head"] if stage == len(blocks) - 1 else []
        rank = (
            min(stage, len(blocks) - 1 - stage)
            if len(blocks) > parallel.pipeline_parallel
            else stage
        )
        layers = f"{bounds[stage]}-{bounds[stage + 1] - 1}"
        bar = "#" * max(1, round(20 * cost / max(costs)))
        rows.append((f"{stage}", f"{rank}", layers, f"{cost:.2f}", f"{bar} {' + '.join(ends)}"))
    idle = 1 - sum(costs) / len(costs) / max(costs)
    bubble = stages.modelled_bubble(
        parallel.pipeline_parallel, run.train.gradient_accumulation_steps
    )
    return (
        f"{_columns(rows)}\n"
        f"cost in blocks; uneven stages idle {idle:.1%}, a 1F1B bubble of "
        f"(p-1)/(m+p-1) is {bubble:.1%}"
    )


def placement_text(run: RunConfig) -> str:
    """The axes with the group of rank 0, the ranks host by host, and what ZeRO shards."""
    layout, per_host = run.layout, run.launch.devices_per_host
    rows = [("axis", "size", "ranks", "hosts per group", "divides")]
    rows += [
        (
            axis.name,
            str(axis.size),
            _ranks_text(axis.ranks(0)),
            str(layout.hosts_per_group(axis, per_host)),
            axis.divides,
        )
        for axis in layout.axes
        if axis.size > 1
    ]
    if len(rows) == 1:
        return "one rank"
    legend = "ranks: the group of rank 0; () ranks of a TP group, [] of an SP group"
    states = SHARDED[engine_zero_stage(run)]
    group = "a MiCS shard group" if run.parallel.mics_shard_size else "DP x SP"
    zero = f"{states} sharded over the {run.zero_ranks} ranks of {group}"
    return "\n".join([_columns(rows), *layout.drawing(per_host), legend, zero])


def _ranks_text(ranks: tuple[int, ...]) -> str:
    """`0 4 8 12`, or of many `0 4 8 .. 60`."""
    words = [str(rank) for rank in ranks]
    return " ".join(words if len(words) <= 6 else [*words[:3], "..", words[-1]])


def data_text(run: RunConfig) -> str:
    """Tokens and epochs by corpus, then what a real run would stop at."""
    own = text_settings.of_run(run)
    if own:
        lines = [prepared_text(own)]
    elif run.data.data_file_list == data_list.BUILTIN:
        lines = [
            "built-in corpus (code and prose of the Python standard library), made at first use"
        ]
    else:
        lines = []
    survey = survey_of(run)
    if survey.corpora:
        lines.append(epochs_text(survey))
    shown = survey.problems[: data_survey.SHOWN_PROBLEMS]
    lines += [f"WARNING: a real run would stop here with status 3: {problem}" for problem in shown]
    if len(survey.problems) > len(shown):
        lines.append(f"WARNING: and {len(survey.problems) - len(shown)} more")
    return "\n".join(lines)


def epochs_text(survey: data_survey.DataSurvey) -> str:
    """Tokens, share and epochs of each corpus over the run, and the data stages if several."""
    parts = [_columns(data_survey.corpora_table(survey.corpora))]
    if len(survey.stages) > 1:
        parts += [f"from {start:,} tokens on: {path}" for start, path in survey.stages]
    return "\n".join(parts)


def length_text(run: RunConfig) -> str:
    """Steps and tokens, and the batch where it grows."""
    steps, sizes = run.train.train_iters, run.batch_sizes
    tokens = f"{run.total_samples * run.model.seq_length:,} tokens"
    if not sizes.samples:
        return f"{steps:,} steps x {run.tokens_per_step:,} tokens = {tokens}"
    full = next((n for n, _, size in sizes.stretches() if size == sizes.full), steps)
    return (
        f"{steps:,} steps = {run.total_samples:,} samples = {tokens}; samples per step grow from "
        f"{sizes.start:,} by {sizes.increment:,} to {sizes.full:,}, from step {full + 1:,} on"
    )


def skip_text(run: RunConfig) -> str:
    """The ranges that are not trained on, with what they cost."""
    ranges = run.skip_ranges
    if not ranges:
        return "none"
    last = run.train.train_iters
    steps = skip.skipped_before(last + 1, ranges)
    before = run.batch_sizes.consumed
    samples = sum(before(min(b, last)) - before(min(a - 1, last)) for a, b in ranges)
    return (
        f"{skip.ranges_text(ranges)}: {steps:,} steps, {samples:,} samples, "
        f"{samples * run.model.seq_length:,} tokens are skipped"
    )


def messages_text(resolved: Resolved) -> str:
    """Warnings and notes, one per line; empty where there are none."""
    lines = [f"WARNING: {warning}" for warning in resolved.warnings]
    return "\n".join([*lines, *(f"note: {note}" for note in resolved.notes)])


def dry_run_text(resolved: Resolved, launch_command: str) -> str:
    """All that `DRY_RUN=1` prints.

    Args:
        resolved: the configuration.
        launch_command: the command that a real run would start.
    """
    run = resolved.run
    parts: Sequence[tuple[str, str]] = (
        ("", messages_text(resolved)),
        ("configuration", resolved_table(resolved)),
        ("", architecture_box(run)),
        ("parameters", f"{run.parameters:,} ({run.parameters})"),
        ("length", length_text(run)),
        ("ranks", placement_text(run)),
        (f"pipeline stages, {run.parallel.pipeline_schedule}", stages_text(run)),
        (
            "memory of the fullest rank at its peak, estimated",
            memory_text(run, resolved.device_gib),
        ),
        ("data", data_text(run)),
        ("steps to skip", skip_text(run)),
        ("run folder", str(run.run_folder)),
        (deepspeed_title(run), json.dumps(deepspeed_config(run), indent=2)),
        ("launch command", launch_command),
    )
    blocks = [f"-- {title} --\n{text}" if title else text for title, text in parts if text]
    return "\n\n".join([*blocks, "Dry run: nothing was started."]) + "\n"


def deepspeed_title(run: RunConfig) -> str:
    """Of DeepSpeed's configuration, which not every run is given."""
    if run.sharded is None:
        return "DeepSpeed configuration"
    return "DeepSpeed configuration, not used: ENGINE=sharded takes the steps"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows with their columns aligned to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

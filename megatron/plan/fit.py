"""Whether a run fits its devices: the verdict, the cheapest change that fits, and defaults that do.

A change is an entry of `changes`, in the order of what it costs. A value that the user or a preset
has set is never changed for them; a start that does not fit is warned about, not refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from megatron.config import schema
from megatron.config.resolve import Resolved, Site, resolve
from megatron.config.schema import RunConfig
from megatron.config.update_rules import RULES
from megatron.plan.memory import GIB, memory_per_rank

USABLE = 0.95
"""Of a device's memory: the driver, the collectives' workspaces and fragmentation take the rest."""

RECOMPUTE = ("0", "selective", "1")
ZERO, CHECKPOINTING = "ZERO_STAGE", "USE_ACTIVATION_CHECKPOINTING"
MICRO, ACCUMULATION, TP = "MICRO_BATCH", "GRAD_ACC_STEPS", "TP"
Settings = Mapping[str, str]  # variable -> value


def fits(run: RunConfig, device_gib: float) -> bool:
    """Whether the fullest rank's estimate fits what is usable of a device."""
    return memory_per_rank(run).total <= USABLE * device_gib * GIB


def changes(run: RunConfig) -> Iterator[Settings]:
    """What would lower the memory, the cheapest first; the empty change is not among them.

    Recomputing costs up to a third of the compute. ZeRO 2 and 3 reduce gradients after each
    micro-batch, so they come first where a step has one alone. Then smaller micro-batches (the
    batch stays), then tensor parallelism inside a host.
    """
    states = [stage for stage in (0, 1, 2, 3) if _allows(run, stage)]
    recompute = RECOMPUTE[RECOMPUTE.index(run.train.activation_checkpointing) :]
    if run.train.gradient_accumulation_steps == 1:
        pairs: list[tuple[int, str]] = [(z, r) for r, z in product(recompute, states)]
        pairs.sort(key=lambda pair: pair[0] == 3)  # gathers all weights, twice
    else:
        pairs = list(product(states, recompute))
    for tp, micro in product(_tensor_parallel(run), _micro_batches(run)):
        for stage, recomputed in pairs:
            found = {
                ZERO: str(stage), CHECKPOINTING: recomputed, MICRO: str(micro), TP: str(tp),
            }  # fmt: skip
            change = {name: value for name, value in found.items() if value != _value(run, name)}
            if MICRO in change:
                steps = run.train.gradient_accumulation_steps * run.train.micro_batch_size // micro
                change[ACCUMULATION] = str(steps)
            if change:
                yield change


def _allows(run: RunConfig, stage: int) -> bool:
    """Whether a ZeRO stage may follow the run's."""
    parallel = run.parallel
    if stage == parallel.zero_stage:
        return True
    single = parallel.pipeline_parallel == 1 and not RULES[run.optimizer.optimizer].whole_matrix
    return stage > max(1, parallel.zero_stage) and single and run.zero_ranks > 1


def _tensor_parallel(run: RunConfig) -> list[int]:
    """Sizes from the run's on that shard every matrix evenly, inside a host."""
    model, now = run.model, run.parallel.tensor_parallel
    sizes = (model.num_key_value_heads, model.hidden_size, model.ffn_hidden_size)
    return [
        tp
        for tp in range(now, run.launch.devices_per_host + 1)
        if tp % now == 0
        and run.data_parallel % (tp // now) == 0
        and run.launch.devices_per_host % tp == 0
        and all(size % tp == 0 for size in sizes)
        and model.num_attention_heads % (tp * run.parallel.sequence_parallel) == 0
    ]


def _micro_batches(run: RunConfig) -> list[int]:
    now = run.train.micro_batch_size
    return [size for size in range(now, 0, -1) if now % size == 0]


def _value(run: RunConfig, variable: str) -> str:
    section, _, field = schema.by_variable()[variable].key.partition(".")
    return str(getattr(getattr(run, section), field))


def changed(run: RunConfig, change: Settings) -> RunConfig:
    """The run with a change; with another TP the ranks stay, and so fewer samples make a step."""
    sections: dict[str, dict[str, object]] = {}
    for variable, text in change.items():
        option = schema.by_variable()[variable]
        section, _, field = option.key.partition(".")
        sections.setdefault(section, {})[field] = option.parse(text, variable)
    replaced = {
        name: dataclasses.replace(getattr(run, name), **fields) for name, fields in sections.items()
    }
    return dataclasses.replace(run, **replaced)


def cheapest(run: RunConfig, device_gib: float, fixed: Sequence[str] = ()) -> Settings | None:
    """The first change that fits, without the variables `fixed`; None where none does."""
    return next(
        (
            change
            for change in changes(run)
            if not change.keys() & set(fixed) and fits(changed(run, change), device_gib)
        ),
        None,
    )


def fitted(
    found: Resolved, environ: Mapping[str, str], argv: Sequence[str], site: Site
) -> Resolved:
    """What was resolved, with what nobody has set chosen such that the run fits the devices.

    Args:
        found: what `resolve` made of the other three.
        environ, argv, site: as `resolve` has them.
    """
    if not found.device_gib or fits(found.run, found.device_gib):
        return found
    free = ("default", f"machine {site.machine}", "GLOBAL_BATCH / (MICRO_BATCH x DP)")
    fixed = [
        name
        for name in (ZERO, CHECKPOINTING, MICRO, ACCUMULATION, TP)
        if found.sources[schema.by_variable()[name].key] not in free
    ]
    change = cheapest(found.run, found.device_gib, fixed)
    if change:
        preferred = {**site.defaults, **change}
        chosen = resolve(environ, argv, dataclasses.replace(site, defaults=preferred))
        if fits(chosen.run, found.device_gib):
            for name in change:
                chosen.sources[schema.by_variable()[name].key] = "fits the device's memory"
            words = assignments(change)
            chosen.notes.append(
                f"{words} so that the run fits {found.device_gib:g} GiB per device; a value that "
                "you set wins"
            )
            return chosen
    found.warnings.append(". ".join(verdict(found.run, found.device_gib)))
    return found


def assignments(change: Settings) -> str:
    """`ZERO_STAGE=2 TP=4`, as it is written before the command."""
    return " ".join(f"{name}={value}" for name, value in change.items())


def verdict(run: RunConfig, device_gib: float) -> list[str]:
    """Sentences: whether it fits, by how much, what is largest, and what to add."""
    estimate, usable = memory_per_rank(run), USABLE * device_gib
    needed = estimate.total / GIB
    place = f"{device_gib:g} GiB per device, {usable:.1f} of them usable"
    if needed <= usable:
        return [f"fits: {needed:.1f} of {place}"]
    largest, size = max(estimate._asdict().items(), key=lambda part: part[1])
    lines = [
        f"does not fit: {needed:.1f} GiB, {needed - usable:.1f} more than there are ({place})",
        f"largest: {largest}, {size / GIB:.1f} GiB",
    ]
    change = cheapest(run, device_gib)
    if change is None:
        return [*lines, "no ZERO_STAGE, recomputation, MICRO_BATCH or TP inside a host is enough: "
                        "take more hosts, PP, or a smaller model"]  # fmt: skip
    then = memory_per_rank(changed(run, change)).total / GIB
    return [*lines, f"the cheapest change that fits ({then:.1f} GiB): {assignments(change)}"]

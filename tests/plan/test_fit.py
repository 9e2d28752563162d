"""A default command fits its machine; where nothing set fits, the cheapest change is named."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.resolve import Resolved, Site, resolve
from megatron.config.schema import RunConfig
from megatron.launch.machines import MACHINES, Machine
from megatron.plan.fit import USABLE, changed, changes, cheapest, fits, fitted, verdict
from megatron.plan.memory import memory_per_rank
from megatron.plan.report import dry_run_text
from tests.config.helpers import configured, resolved

HOSTS = (1, 2, 16, 256)


def site_of(machine: Machine, hosts: int) -> Site:
    return Site(
        machine.name, True, hosts, machine.devices_per_host, machine.defaults(hosts),
        machine.device_gib,
    )  # fmt: skip


def at(machine: str, hosts: int = 1, **environ: object) -> Resolved:
    """A dry run at a machine."""
    entry = next(entry for entry in MACHINES if entry.name == machine)
    texts = {"DRY_RUN": "1"} | {name: str(value) for name, value in environ.items()}
    site = site_of(entry, hosts)
    return fitted(resolve(texts, [], site), texts, [], site)


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_the_default_command_of_a_machine_fits(machine: Machine, hosts: int) -> None:
    assert machine.device_gib >= 40
    found = at(machine.name, hosts)
    assert found.run.label == "AuroraGPT-7B"
    assert fits(found.run, machine.device_gib), verdict(found.run, machine.device_gib)
    assert not any("does not fit" in warning for warning in found.warnings)
    # What was chosen for it is said, with its source.
    chosen = [key for key, source in found.sources.items() if source.startswith("fits the")]
    assert bool(chosen) == any(
        f"fits {machine.device_gib} GiB" in note.replace(".0", "") for note in found.notes
    )


def test_defaults_are_as_cheap_as_fits() -> None:
    aurora = at("aurora").run
    assert (aurora.parallel.zero_stage, aurora.train.activation_checkpointing) == (1, "1")
    assert at("perlmutter", 16).run.train.activation_checkpointing == "0"
    small = at("aurora", MODEL_ARCH="2B").run
    assert (small.parallel.zero_stage, small.train.activation_checkpointing) == (1, "0")


def test_what_the_user_has_set_is_warned_about_and_never_changed() -> None:
    settings = {"USE_ACTIVATION_CHECKPOINTING": 0, "ZERO_STAGE": 1, "MICRO_BATCH": 1, "TP": 1}
    found = at("aurora", **settings)
    run = found.run
    assert (run.parallel.zero_stage, run.train.activation_checkpointing) == (1, "0")
    (warning,) = (text for text in found.warnings if text.startswith("does not fit"))
    assert "more than there are (64 GiB per device, 60.8 of them usable)" in warning
    assert "largest: gradients, 28." in warning
    assert "the cheapest change that fits (54.4 GiB): USE_ACTIVATION_CHECKPOINTING=1" in warning
    # The line it gives fits; what was left open is chosen beside what was set.
    assert fits(at("aurora", **settings | {"USE_ACTIVATION_CHECKPOINTING": 1}).run, 64)
    open_tp = at("aurora", USE_ACTIVATION_CHECKPOINTING=0, ZERO_STAGE=1)
    assert open_tp.run.parallel.tensor_parallel == 2 and fits(open_tp.run, 64)


def test_a_preset_s_own_layout_is_kept() -> None:
    run = at("aurora", 32, MODEL_ARCH="33B").run
    assert (run.parallel.tensor_parallel, run.parallel.zero_stage) == (6, 2)


def test_the_dry_run_says_all_of_it() -> None:
    text = dry_run_text(at("polaris", 2, USE_ACTIVATION_CHECKPOINTING=0, ZERO_STAGE=1, TP=1), "")
    for word in (
        "does not fit: ",
        "40 GiB per device",
        "largest: ",
        "the cheapest change that fits",
    ):
        assert word in text
    assert "\nfits: " in dry_run_text(at("polaris", 2), "")
    assert "fits the device's memory" in dry_run_text(at("polaris", 2), "")
    assert "the memory of a device is not known here" in dry_run_text(resolved(), "")
    assert at("aurora", DEVICE="cpu").device_gib == 0


def test_a_model_that_no_change_fits_is_said() -> None:
    found = at("polaris", 1, MODEL_ARCH="70B", TRAIN_ITERS=1)
    assert any("is enough: take more hosts" in warning for warning in found.warnings)


# (nodes, PP, TP, GAS) that ran for the authors of the 70B table, at 4,096 tokens and with layers
# recomputed; theirs ran out of memory at 8 nodes with TP=1, and at 16 with GAS=16.
RAN = [(8, 8, 2, 1), (8, 8, 2, 4), (8, 8, 2, 32), (16, 16, 1, 1), (16, 16, 1, 8), (16, 16, 1, 16)]


def test_published_layouts_of_the_70b_fit() -> None:
    def peak(nodes: int, pp: int, tp: int, gas: int) -> float:
        settings = {"MODEL_ARCH": "70B", "VOCAB_SIZE": 32000, "SEQ": 4096, "ZERO_STAGE": 0}
        settings |= {"USE_ACTIVATION_CHECKPOINTING": 1, "PP": pp, "TP": tp, "GAS": gas}
        return memory_per_rank(at("aurora", nodes, **settings).run).total / 2**30

    assert all(peak(*row) < 40 for row in RAN)
    assert 60 < peak(8, 8, 1, 1) < USABLE * 64  # at the edge; with 6 bytes of gradients beyond it


RUNS: list[dict[str, Any]] = [
    {"WORLD_SIZE": 24, "NGPU_PER_HOST": 12, "NHOSTS": 2, "GRAD_ACC_STEPS": 4},
    {"WORLD_SIZE": 8, "NGPU_PER_HOST": 8, "MICRO_BATCH": 4, "GRAD_ACC_STEPS": 1},
    {"WORLD_SIZE": 16, "PP": 4, "GRAD_ACC_STEPS": 8, "NGPU_PER_HOST": 8, "NHOSTS": 2},
    {"WORLD_SIZE": 8, "OPT": "muon", "NGPU_PER_HOST": 8, "GRAD_ACC_STEPS": 2},
    {"WORLD_SIZE": 8, "ZERO_STAGE": 3, "NGPU_PER_HOST": 8, "GRAD_ACC_STEPS": 2},
]


@pytest.mark.parametrize("settings", RUNS)
def test_every_change_can_be_typed(settings: dict[str, Any]) -> None:
    """What is offered is accepted, and means what was counted."""
    base = {"MODEL_ARCH": "7B", "VOCAB_SIZE": 32000, "DTYPE": "bf16", "TRAIN_ITERS": 9}
    run = configured(**base, **settings)
    found = list(changes(run))
    assert found and all(found.count(change) == 1 for change in found)
    for change in found:
        typed: RunConfig = configured(**{**base, **settings, **change})
        assert memory_per_rank(typed) == memory_per_rank(changed(run, change)), change


def test_the_cheapest_is_the_first_that_fits() -> None:
    run = configured(MODEL_ARCH="7B", VOCAB_SIZE=32000, DTYPE="bf16", **RUNS[0])
    for gib in (30, 40, 60, 100):
        change = cheapest(run, gib)
        assert change is not None
        before = [c for c in changes(run) if c != change][: list(changes(run)).index(change)]
        assert fits(changed(run, change), gib)
        assert not any(fits(changed(run, other), gib) for other in before)
    assert cheapest(run, 1) is None
    assert not fits(run, memory_per_rank(run).total / 2**30)  # not without room for the driver
    assert fits(run, memory_per_rank(run).total / 2**30 / USABLE + 0.01)

"""tools/benchmark.py: arms take turns and compute the same loss, tables say what was measured."""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.config.errors import ConfigError
from tests.e2e.front_door import environment
from tools import benchmark
from tools.benchmarks import arms, entry, flame, scaling, seed_table, step, step_profile
from tools.benchmarks.record import Record, spread
from tools.benchmarks.rounds import Arm, Rounds
from tools.benchmarks.workload import SHAPES, Workload, shape_variables

ROOT = Path(__file__).resolve().parents[2]
TINY = Workload(SHAPES["tiny"], threads=1)


def options(**more: Any) -> argparse.Namespace:
    """Of `step`."""
    usual = {"arms": ["ours", "hf"], "rounds": 3, "seconds": 1.0, "turns": "together", "out": None}
    return argparse.Namespace(**{**usual, **more})


class Scripted:
    """Stands for `Arm`: answers at once, and notes who worked when."""

    worked: list[str]
    firsts: dict[str, float]
    seconds: dict[str, Callable[[], float]]

    def __init__(self, name: str, *others: Any) -> None:
        self.name = name

    def round(self, steps: int) -> dict[str, Any]:
        self.worked.append(self.name)
        losses = [self.firsts.get(self.name, 9.0)] * steps
        if self.name == arms.GEMM:
            losses = [2048.0] * steps
        elif self.name not in self.seconds:
            return {"error": "OutOfMemoryError: no"}
        seconds = self.seconds.get(self.name, lambda: 0.01)()
        return {"seconds": seconds, "losses": losses, "peak_gib": 1.5}

    def close(self) -> None:
        self.worked.append(f"-{self.name}")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    """`step` with such arms, `ours` twice as slow as `hf`, on a machine that slows down."""
    drift = iter(range(1, 100))
    Scripted.worked, Scripted.firsts = [], {}
    Scripted.seconds = {"ours": lambda: 2.0 * next(drift), "hf": lambda: 1.0 * next(drift)}
    monkeypatch.setattr(step, "Arm", Scripted)
    return Scripted


def test_arms_take_turns_beside_the_rate_of_products(
    scripted: type[Scripted], tmp_path: Path
) -> None:
    results = step.measure(TINY, options(), tmp_path)
    rounds = scripted.worked[scripted.worked.index("hf") + 3 :]
    assert rounds[:-3] == ["GEMM", "ours", "GEMM", "hf"] * 3
    assert [len(result.seconds) for result in results] == [3, 3]
    scripted.worked.clear()
    step.measure(TINY, options(turns="alone"), tmp_path)
    alone = [name for name in scripted.worked if name != "GEMM"]
    assert alone.index("-ours") < alone.index("hf"), "one is gone before the next takes memory"


def test_another_loss_is_no_measurement(scripted: type[Scripted], tmp_path: Path) -> None:
    for off, fine in ((5e-5, True), (2e-4, False), (float("nan"), False)):
        scripted.firsts = {"ours": 9.0, "hf": 9.0 + off}
        _, hf = step.measure(TINY, options(), tmp_path)
        assert bool(hf.seconds) is fine
        assert ("differs" in hf.why) is not fine


def test_what_cannot_run_stays_a_row(scripted: type[Scripted], tmp_path: Path) -> None:
    del scripted.seconds["hf"]
    chosen = options(arms=["ours", "hf", "nobody", "litgpt"])
    results = step.measure(TINY, chosen, tmp_path)
    rows = step.report(TINY, "tiny", results).rows
    assert [row[0] for row in rows] == chosen.arms
    assert rows[1][1] == "OutOfMemoryError: no"
    assert "unknown" in rows[2][1]
    assert rows[0][1], "ours is measured all the same"


def test_the_table_of_a_step() -> None:
    ours = step.Result("ours", losses=[6.2], seconds=[1.0, 2.0, 4.0], gemm=[1e-3, 5e-4, 2.5e-4])
    theirs = step.Result("hf", losses=[6.2], seconds=[2.0, 4.0, 8.0], gemm=[1e-3] * 3)
    record = step.report(TINY, "tiny", [ours, theirs])
    run = TINY.run()
    flops = 128 * run.architecture.flops_per_token_lm(run.model)
    assert record.data["flops_per_step"] == flops
    rate, ratio, _, of_gemm = record.rows[0][1:5]
    assert rate == "64 (32 to 128)"
    assert ratio == "2.00 (2.00 to 2.00)", "round by round: the machine's drift is in both"
    assert of_gemm == f"{flops / 1e9:.0%}"
    assert json.dumps(record.data)


def fails(rounds: Rounds, work: Workload) -> None:
    """An arm that breaks on its first step."""
    rounds.wait()
    raise MemoryError("no memory\nat all")


def sleeps(rounds: Rounds, work: Workload) -> None:
    """An arm whose steps take 20 ms."""
    tokens = work.batches()
    wanted = rounds.wait()
    while wanted:
        time.sleep(0.02)
        wanted = rounds.done(next(tokens)[0][0].float().mean())


@pytest.mark.flaky(reruns=1)
def test_an_arm_is_a_process_that_stays(tmp_path: Path) -> None:
    arm, broken = Arm("a", sleeps, TINY, tmp_path / "a"), Arm("b", fails, TINY, tmp_path / "b")
    first, second = arm.round(2), arm.round(5)
    assert 0.02 <= second["seconds"] < 0.1
    means = [float(batch[0][0].float().mean()) for batch in islice(TINY.batches(), 7)]
    assert first["losses"] + second["losses"] == pytest.approx(means), "it went on, not anew"
    assert broken.round(1) == {"error": "MemoryError: no memory"}
    assert "ended with status 0" in broken.round(1)["error"]
    arm.close()
    broken.close()


def test_labels_are_the_tokens_that_follow_and_steps_differ() -> None:
    work = Workload({**SHAPES["tiny"], "GRAD_ACC_STEPS": "2"})
    one, two = (next(work.batches()) for _ in range(2))
    assert len(one) == 2
    for (tokens, labels), (again, _) in zip(one, two, strict=True):
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        assert torch.equal(tokens, again)
    _, later = islice(work.batches(), 2)
    assert not torch.equal(one[0][0], later[0][0])


def test_a_shape_is_a_name_or_variables() -> None:
    assert shape_variables("40m,SEQ=1024")["SEQ"] == "1024"
    assert shape_variables("NLAYERS=3,HIDDEN=64") == {"NLAYERS": "3", "HIDDEN": "64"}
    for wrong in ("50m", "40m,SEQ", "LAYERS=3"):
        with pytest.raises(ConfigError, match="--shape"):
            shape_variables(wrong)
    sizes = {"40m": 40.4e6, "106m": 106.2e6, "1b": 1.107e9, "llama3-14": 2.982239232e9}
    for name, parameters in sizes.items():
        run = Workload(shape_variables(name)).run()
        assert run.architecture.parameters(run.model) == pytest.approx(parameters, rel=0.01)


def test_rows_of_the_published_table(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"elapsed_s": 1.0, "tokens_per_gpu_per_s": 42020.0, "tflops_lm": 731.5,
              "tflops_ds": 700.0, "tflops_causal": 642.0, "mfu": 0.739,
              "memory_max_gib": 60.0 + n} for n in range(3)]  # fmt: skip
    found = {
        "smollm3-3B:8": entry.Short("ok", steps),
        "llama3-3B:28": entry.Short("out of memory"),
        "llama3-3B:14": entry.Short("ok", steps),
    }
    rows = seed_table.report(found, seed_table.SETTINGS, "seed-table").rows
    assert [row[:3] for row in rows] == [
        ("llama3-3B", "14", "2.98"), ("llama3-3B", "28", "4.39"), ("smollm3-3B", "8", "1.67")
    ]  # fmt: skip
    assert rows[0][3:] == (
        "42,020", "731.5", "700.0", "642.0", "73.9%", "62.0", "10.00", "ok"
    )  # fmt: skip
    assert rows[1][3:] == ("", "", "", "", "", "", "", "out of memory")
    assert set(seed_table.PUBLISHED) <= set(seed_table.ROWS)
    chosen = argparse.Namespace(set=["NO_SUCH_OPTION=1"])
    assert seed_table.main(chosen) == 0
    assert "NO_SUCH_OPTION=1 is no option" in capsys.readouterr().out


def test_scaling_keeps_the_samples_of_a_rank_or_of_the_step() -> None:
    rows = scaling.plan([1, 2, 4], 2)
    assert [row["GLOBAL_BATCH"] for row in rows.values()] == ["2", "4", "8", "8", "8", "8"]
    seconds = {("weak", 1): [1.0], ("weak", 2): [1.25], ("strong", 1): [4.0], ("strong", 4): [2.0]}
    chosen = argparse.Namespace(dtype="fp32", shape="tiny")
    table = scaling.report(rows, seconds, SHAPES["tiny"], "weak, 4", chosen).rows
    assert [row[5] for row in table] == ["100%", "80%", "", "100%", "", "50%"]


@pytest.mark.parametrize("seed", range(3))
def test_a_flame_graph_has_the_time_of_its_stacks(seed: int) -> None:
    draw = random.Random(seed)
    stacks = {
        tuple(draw.choice("ab<") for _ in range(draw.randint(1, 4))): draw.uniform(1, 9)
        for _ in range(12)
    }
    total = sum(stacks.values())
    lines = flame.folded_text(stacks).splitlines()
    assert sum(int(line.split()[-1]) for line in lines) == pytest.approx(1e3 * total, abs=12)
    picture = flame.svg(stacks, "title")
    tops = [float(w) for y, w in re.findall(r'y="(\d+)" width="([\d.]+)"', picture) if y == "17"]
    assert sum(tops) == pytest.approx(flame.WIDTH, abs=1)
    assert "<title><:" not in picture


def event(name: str, *inside: str, shapes: Any = ()) -> Any:
    """As the profiler's, below others."""
    above = event(inside[0], *inside[1:]) if inside else None
    return SimpleNamespace(name=name, cpu_parent=above, input_shapes=shapes)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (event("aten::mm"), "GEMM"),
        (event("sm90_xmma_gemm_bf16bf16_f32"), "GEMM"),
        (event("aten::_scaled_dot_product_flash_attention_backward"), "attention"),
        (event("c10d::allreduce_"), "communication"),
        (event("ncclDevKernel_AllReduce_Sum_f32"), "communication"),
        (event("aten::mul"), "elementwise, norms"),
        (event("aten::mul", shapes=[[2, 64, 512], []]), "loss"),
        (event("aten::mm", shapes=[[128, 64], [64, 512]]), "GEMM"),
        (event("aten::_log_softmax"), "loss"),
        (event("aten::mul", "Optimizer.step#AdamW.step"), "optimizer"),
        (event("aten::copy_"), "copies and casts"),
        (event("MmBackward0"), "dispatch"),
    ],
)
def test_the_kind_of_an_operator(found: Any, kind: str) -> None:
    assert step_profile.kind_of(found, 512) == kind


def test_files_say_where_figures_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "tools/benchmark.py"), "step", "--rounds", "2"])
    Record("a", "About", ("x",), [("1",)], {"figure": 1}, ["note"]).write(tmp_path)
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["figure"] == 1
    assert document["command"] == "python3 tools/benchmark.py step --rounds 2"
    assert re.match(r"\d{4}-\d\d-\d\d", document["date"])
    assert "cores" in document["hardware"] and "torch" in document["software"]
    assert (tmp_path / "a.md").read_text() in capsys.readouterr().out
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert benchmark.main([]) == 2
    assert "seed-table" in capsys.readouterr().out


@pytest.mark.long
def test_our_step_and_a_peers_compute_one_loss(tmp_path: Path) -> None:
    """Real engines, from the command; every kind of arm that is installed here."""
    command = [sys.executable, "tools/benchmark.py", "step", "--shape", "tiny", "--rounds", "2"]
    chosen = [
        "--arms",
        "ours",
        "hf",
        "plain",
        "fsdp2",
        "hf-trainer",
        "--seconds",
        "0.1",
        "--threads",
        "1",
    ]
    result = subprocess.run(
        [*command, *chosen, "--out", str(tmp_path)], cwd=ROOT, env=environment({}), timeout=250
    )
    assert result.returncode == 0
    found = json.loads((tmp_path / "step-tiny-fp32.json").read_text())["arms"]
    ours, *others = found
    assert ours["seconds"]
    for arm in others:
        if not arm["why"].startswith("not installed"):
            assert arm["losses"] == pytest.approx(ours["losses"], abs=1e-4), arm["name"]


@pytest.mark.long
def test_the_rehearsal_for_a_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", "tools/gpu_check.sh", str(tmp_path)],
        cwd=ROOT,
        env=environment({"REHEARSE": "1"}),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    text = (tmp_path / "all.md").read_text()
    steps = re.findall(r"^\| (\w+) \| (\S+) \| \d+ s", text, re.MULTILINE)
    names = ["environment", "tests", "table", "step", "profile", "fp8"]
    assert steps == [(name, "ok") for name in names]
    assert "| llama3-3B | 14 |" in text
    assert (tmp_path / "all.tar.gz").stat().st_size > 1000

"""Figures, endings, identities and forms of a comparison, beside figures worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron.analysis.comparing.compared_run import ComparedRun, open_run, runs_in
from megatron.analysis.comparing.ending import ending
from megatron.analysis.comparing.figures import FIGURES, Sums
from megatron.analysis.comparing.identities import violations
from megatron.analysis.comparing.many import many
from megatron.analysis.comparing.pair import pair
from megatron.analysis.comparing.result_table import FORMS, ordered
from megatron.config.errors import ConfigError
from megatron.training import metrics_file
from tests.training import records_factory as make

PUBLISHED = {
    "polaris": {"devices": 8, "steps": 100, "seconds": 408.6051, "tokens": 6_553_600,
                "loss": 3.048191022872925, "eval_loss": 2.8139, "eval_seconds": 6.26},
    "aurora": {"devices": 24, "steps": 100, "seconds": 299.1983, "tokens": 19_660_800,
               "loss": 2.8478338932991027, "eval_loss": 2.5437, "eval_seconds": 9.12},
}  # fmt: skip
"""Raw figures of a published comparison of two machines: sequences of 8,192, one sample a device.
Its own tokens/s, 2,004.87 and 2,737.98, are those of one device."""


def write(folder: Path, records: list[dict[str, Any]], run: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    text = "".join(f"{metrics_file.encode(record)}\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
    return folder


def published(name: str, **changes: Any) -> list[dict[str, Any]]:
    """The records of a run with these raw figures."""
    raw = PUBLISHED[name]
    devices, elapsed, seq = int(raw["devices"]), raw["seconds"] / raw["steps"], 8192
    records = [
        make.step(
            number,
            raw["loss"],
            elapsed_s=elapsed,
            global_batch_size=devices,
            seq_length=seq,
            world_size=devices,
            data_parallel=devices,
            consumed_samples=devices * number,
            consumed_tokens=devices * seq * number,
            samples_per_s=devices / elapsed,
            tokens_per_s=devices * seq / elapsed,
            tokens_per_gpu_per_s=seq / elapsed,
            **changes,
        )
        for number in range(1, int(raw["steps"]) + 1)
    ]
    last = make.evaluation(100, raw["eval_loss"])
    return [*records, last | {"samples": 50, "elapsed_s": raw["eval_seconds"]}]


def figure(run: ComparedRun, name: str) -> Any:
    return next(one for one in FIGURES if one.name == name).value(Sums(run))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tokens seen", (6_553_600, 19_660_800)),
        ("tokens/s", (16_039, 65_712)),
        ("tokens/s per device", (2_004.87, 2_737.98)),
        ("tokens/sample", (8_192, 8_192)),
        ("tokens/step", (65_536, 196_608)),
        ("steps/s", (0.245, 0.334)),
        ("samples/s", (1.958, 8.021)),
        ("s/step, median", (4.086, 2.992)),
        ("steps/s per device", (0.0306, 0.0139)),
        ("perplexity", (16.6743, 12.7268)),
        ("train: mean loss", (3.0482, 2.8478)),
        ("train: runtime, s", (408.6051, 299.1983)),
        ("eval: samples/s", (50 / 6.26, 50 / 9.12)),
    ],
)
def test_the_published_figures_follow_from_their_raw_sums(
    tmp_path: Path, name: str, wanted: tuple[float, float]
) -> None:
    runs = [open_run(write(tmp_path / run, published(run))) for run in PUBLISHED]
    for run, value in zip(runs, wanted, strict=True):
        assert figure(run, name) == pytest.approx(value, rel=3e-3 if value < 1 else 1e-4)
    assert violations(Sums(runs[0])) == violations(Sums(runs[1])) == []


def test_the_published_ratios(tmp_path: Path) -> None:
    """1.36 times the steps a second, 0.45 of them by device, and losses of unlike runs."""
    table = pair(*(open_run(write(tmp_path / run, published(run))) for run in PUBLISHED))
    rows = {row[0]: row for row in table.rows}
    assert rows["steps/s"][3] == pytest.approx(1.366, abs=1e-3)
    assert rows["steps/s per device"][3] == pytest.approx(0.4552, abs=1e-3)
    assert rows["tokens/s"][3] == pytest.approx(65_711.6 / 16_039.0, rel=1e-4)
    for name in ("last loss", "train: mean loss", "best validation loss", "perplexity"):
        assert rows[name][4] == "not comparable: tokens seen" + (
            " 6,553,600 / 19,660,800" if "loss" in name and "val" not in name
            else " then 6,553,600 / 19,660,800"
        )  # fmt: skip
    assert rows["tokens/s"][4] == ""


def test_tokens_of_one_device_as_tokens_of_all_are_found(tmp_path: Path) -> None:
    """The published mistake: 2,004.87 tokens/s of 0.245 steps/s are no 65,536 a step."""
    wrong = [{**r, "tokens_per_s": 2004.87} if r["event"] == "step" else r
             for r in published("polaris")]  # fmt: skip
    run = open_run(write(tmp_path / "polaris", wrong))
    lines = violations(Sums(run))
    assert lines[0].startswith("tokens/s x s/step = 8,192")
    assert "GBS x SEQ = 65,536, at step 1; 100 of 100 records" in lines[0]
    assert lines[1].startswith("tokens/s per device x devices = 16,039, but tokens/s = 2,004.87")
    for form in ("md", "html"):
        assert "WARNING: polaris: tokens/s x s/step" in FORMS[form](many([run]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"consumed_samples": 7}, "samples of a step, counted = 3, but GBS = 4, at step 2"),
        ({"consumed_tokens": 60}, "tokens of a step, counted = 28, but GBS x SEQ = 32, at step 2"),
        ({"samples_per_s": 16.0}, "samples/s x s/step = 8, but GBS = 4, at step 2"),
    ],
)
def test_each_identity_is_checked(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    records = [make.step(1), make.step(2) | changes, make.skip(3), make.step(4)]
    found = violations(Sums(open_run(write(tmp_path / "a", records))))
    assert any(line.startswith(said) for line in found)


def test_a_batch_that_grows_and_a_skipped_step_violate_nothing(tmp_path: Path) -> None:
    """The two steps of the last record had 4 and 8 samples; its rates are those of 12 in two."""
    grown = {"global_batch_size": 8, "consumed_samples": 24, "consumed_tokens": 192, "steps": 2,
             "samples_per_s": 12.0, "tokens_per_s": 96.0, "tokens_per_gpu_per_s": 48.0}  # fmt: skip
    records = [make.step(1), make.skip(2), make.step(3), make.step(5) | grown]
    assert violations(Sums(open_run(write(tmp_path / "a", records)))) == []


def test_losses_of_other_data_or_other_samples_are_not_comparable(tmp_path: Path) -> None:
    """As many tokens, but of another list, or evaluated on more samples."""
    records = [make.step(1), make.evaluation(1)]
    runs = []
    for name, data, samples in (("a", "x", 80), ("b", "y", 80), ("c", "x", 96)):
        records[1] |= {"samples": samples}
        config = {"config": {"data": {"data_file_list": data, "cache_path": name}}}
        runs.append(open_run(write(tmp_path / name, records, config)))
    a, b, c = runs
    notes = {row[0]: row[4] for row in pair(a, b).rows}
    assert notes["last loss"] == notes["eval: loss"] == "not comparable: DATA_FILE_LIST x / y"
    notes = {row[0]: row[4] for row in pair(a, c).rows}
    assert notes["last loss"] == "" and notes["eval: loss"] == "not comparable: samples 80 / 96"


def test_runtime_with_saves_counts_what_steps_waited_for(tmp_path: Path) -> None:
    behind = make.save(2) | {"held_s": 0.25}
    records = [make.step(1), make.step(2), make.evaluation(2), make.save(2), behind]
    run = open_run(write(tmp_path / "a", records))
    assert figure(run, "train: runtime, s") == pytest.approx(1.0)
    waited = 1.0 + 1.25 + 2.0 + 0.25
    assert figure(run, "runtime with evaluations and saves, s") == pytest.approx(waited)
    assert figure(run, "FLOPs, all devices") == pytest.approx(2 * 3e12 * 2 * 0.5)


def test_epochs_are_tokens_seen_by_tokens_of_the_training_share(tmp_path: Path) -> None:
    run = write(tmp_path / "a", [make.step(10)])
    files = [["c", "x", 100, "uint16", 1.0, None], ["c", "y", 300, "uint16", 1.0, None]]
    record = {"columns": ["corpus", "prefix", "tokens", "dtype", "weight", "max_epochs"],
              "shares": [90, 10, 0], "stages": [{"files": files}]}  # fmt: skip
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    data = run / "checkpoints" / "step-00000010" / "data.json"
    data.write_text(json.dumps([{"record": record}]))
    assert figure(open_run(run), "epochs") == pytest.approx(320 / 360)
    data.write_text("[]")
    assert figure(open_run(run), "epochs") is None


@pytest.mark.parametrize(
    ("records", "log", "row", "wanted"),
    [
        ([{**make.save(2), "event": "stop", "reason": "finished"}], "", {}, "finished"),
        ([{**make.save(2), "event": "stop", "reason": "STOP"}], "", {}, "stopped: STOP"),
        ([{**make.save(2), "event": "stop", "reason": "OutOfMemoryError: CUDA"}], "", {}, "OOM"),
        ([make.step(2)], "", {}, "ended at step 2 of 100"),
        ([], "", {}, "no step"),
        ([], "torch.OutOfMemoryError: CUDA out of memory.\n", {}, "OOM"),
        ([], "rank 3 failed with status 137 (killed by SIGKILL)\n", {}, "OOM"),
        ([make.step(2)], "HUNG: no progress for 60 s\n", {}, "hung"),
        ([], "rank 0 failed with status 1:\nKeyError\n", {}, "status 1"),
        ([], "", {"status": 2}, "setting refused"),
        ([], "", {"status": 124}, "hung"),
        ([make.step(1)], "", {"status": 143, "why": "longer than 60 s"}, "longer than 60 s"),
        ([], "out of memory\nlaunch command: again\n", {}, "no step"),
    ],
)
def test_how_a_run_ended(
    tmp_path: Path, records: list[dict[str, Any]], log: str, row: dict[str, Any], wanted: str
) -> None:
    run = write(tmp_path / "a", records)
    (run / "output.log").write_text(log)
    (run / "sweep_row.json").write_text(json.dumps(row))
    assert ending(open_run(run)) == wanted


@pytest.fixture
def three(tmp_path: Path) -> list[ComparedRun]:
    """A good run, one twice as fast with TP 2, and one that ran out of memory before a step."""
    settings = {"parallel": {"tensor_parallel": 1},
                "optimizer": {"learning_rate": 0.1, "adam_beta1": 0.9}}  # fmt: skip
    write(tmp_path / "a", [make.step(i) for i in (1, 2)], {"config": settings})
    other = {**settings, "parallel": {"tensor_parallel": 2}}
    b = write(tmp_path / "b", [make.step(i, elapsed_s=0.25) for i in (1, 2)], {"config": other})
    (b / "wandb").mkdir()
    (b / "wandb" / "run_url").write_text("https://wandb.ai/x/runs/abc\n")
    (tmp_path / "c").mkdir()
    variables = {"TP": "1", "LR": "0.2"}
    (tmp_path / "c" / "sweep_row.json").write_text(
        json.dumps({"status": 137, "variables": variables})
    )
    return [open_run(path) for path in runs_in([tmp_path])]


def test_a_row_out_of_memory_stays_in_the_table(three: list[ComparedRun]) -> None:
    rows = json.loads(FORMS["json"](many(three)))["rows"]
    assert [(r["run"], r["status"], r["TP"], r["LR"]) for r in rows] == [
        ("a", "ended at step 2 of 100", 1, 0.1),
        ("b", "ended at step 2 of 100", 2, 0.1),
        ("c", "OOM", 1, 0.2),
    ]
    assert rows[1]["tokens/s"] == 2 * rows[0]["tokens/s"] == 128
    assert rows[2]["tokens/s"] is None
    assert "ADAM_BETA1" not in rows[0]  # the same where it is known


def test_lines_are_ordered_by_a_column_and_what_is_not_known_is_last(
    three: list[ComparedRun],
) -> None:
    table = many(three)
    for descending, names in ((False, "abc"), (True, "bac")):
        found = ordered(table, "tokens/s", descending=descending)
        assert "".join(str(row[0]) for row in found.rows) == names
    with pytest.raises(ConfigError, match="no such column"):
        ordered(table, "speed", descending=False)


def test_the_forms_hold_the_same_values(three: list[ComparedRun]) -> None:
    table = many(three)
    rows = list(csv.DictReader(io.StringIO(FORMS["csv"](table))))
    assert rows[1]["W&B"] == "https://wandb.ai/x/runs/abc"
    lines = FORMS["md"](table).splitlines()
    assert len({len(line) for line in lines[:5]}) == 1  # the columns stand under one another
    assert lines[0].split()[1] == "run" and lines[4].startswith("| c   | OOM")
    page = FORMS["html"](table)
    assert '<a href="https://wandb.ai/x/runs/abc">abc</a>' in page
    assert page.count("<table>") == 1 and page.count("<tr>") == 4
    assert "src=" not in page and "@import" not in page and "<link" not in page


def test_json_is_strict_where_a_value_is_not_finite(tmp_path: Path) -> None:
    a, b = (open_run(write(tmp_path / n, [make.step(1, loss)])) for n, loss in
            (("a", math.nan), ("b", 1.0)))  # fmt: skip
    found = json.loads(FORMS["json"](pair(a, b)))
    assert found["steps"]["max_loss_difference"] == "inf"
    assert next(row["a"] for row in found["rows"] if row["what"] == "last loss") == "nan"


def test_names_of_a_page_are_escaped(tmp_path: Path) -> None:
    run = open_run(write(tmp_path / "<script>", [make.step(1)]))
    page = FORMS["html"](many([run]))
    assert '<td data-v="&lt;script&gt;">&lt;script&gt;</td>' in page and page.count("<script>") == 1

"""The published commands, typed as they stand, lead to the published figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schedule import learning_rate
from megatron.plan import report
from tests.seeds.commands import COMMANDS, PIPELINE_70B, ROWS_70B, ROWS_HPZ, SIZES, SMALL
from tests.seeds.typed import MACHINES, Call, result, typed

# Commands that are refused wherever they are typed, and what is said.
REFUSED = {
    "brace": "MODEL_ARCH={smollm3-3B,llama3-3B} is not a known architecture. "
    "Did you mean SmolLM3-3B or smollm3-3B?",
    "3B": "MODEL_ARCH=3B is not a known architecture. Did you mean llama3-3B or smollm3-3B",
}
TODAYS_70B = ("--seq-length", "4096", "--vocab-size", "32000")  # as the published rows were run


def aurora(command: str, folder: Path, hosts: int = 2) -> Call:
    return typed(command, "aurora", hosts, folder)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("key", [key for key in COMMANDS if key not in REFUSED])
def test_every_command_resolves_everywhere(key: str, machine: str, tmp_path: Path) -> None:
    call = typed(COMMANDS[key].text, machine, COMMANDS[key].hosts, tmp_path)
    if (key, machine) == ("42B", "polaris"):  # 8 x 4 devices, made for 12 a host
        assert "is not a multiple of TP=6" in result(call)
        return
    found = call.resolved()
    assert found.in_vain == ()
    assert found.run.machine == ("generic" if machine == "laptop" else machine)
    assert "Dry run: nothing was started." in report.dry_run_text(found, "")


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_on_purpose(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a known architecture") as refused:
        aurora(COMMANDS[key].text, tmp_path).resolved()
    assert str(refused.value).startswith(REFUSED[key])


@pytest.mark.parametrize(("size", "parameters"), SIZES.items())
def test_sizes_and_batch_of_the_small_models(
    size: tuple[str, int], parameters: int, tmp_path: Path
) -> None:
    call = aurora(SMALL.format(arch=size[0], layers=size[1]), tmp_path)
    assert call.environ["DATA_FILE_LIST"] == "ALCF/data-lists/aurora/books.txt"
    run = call.resolved().run
    assert run.parameters == parameters
    assert (run.data_parallel, run.train.global_batch_size, run.model.seq_length) == (24, 48, 8192)
    assert run.model.vocab_size == 256000
    assert (
        run.label
        == f"{size[0].removesuffix('-3B') if size[0][0] == 's' else size[0]}-nLayers{size[1]}"
    )
    again = aurora(f"MODEL_ARCH={run.label} bash train_alcf.sh", tmp_path).resolved().run
    assert again.model == run.model  # a label that was printed can be typed


def test_a_row_with_twice_the_batch(tmp_path: Path) -> None:
    command = SMALL.format(arch="llama3-3B", layers=12).replace("STEPS=2", "STEPS=4")
    assert aurora(command, tmp_path).resolved().run.train.global_batch_size == 96


BLOCKS = {
    "llama3": {"HEADS": 24, "HIDDEN": 3072, "FFN_HIDDEN_SIZE": 8192, "NLAYERS": 14,
               "NUM_KV_HEAD": 8, "SEQ": 8192, "USE_ACTIVATION_CHECKPOINTING": 0, "ZERO": 0},
    "smollm3": {"HEADS": 16, "HIDDEN": 2048, "FFN_HIDDEN_SIZE": 11008, "NLAYERS": 18,
                "NUM_KV_HEAD": 4, "SEQ": 8192, "USE_ACTIVATION_CHECKPOINTING": 0, "ZERO": 0},
    "42B": {"NLAYERS": 48, "GAS": 1, "PP": 1, "HEADS": 48, "USE_ACTIVATION_CHECKPOINTING": 0,
            "FFN_HIDDEN_SIZE": 28668, "SEQ": 4096, "GBS": 16, "DP": 16, "NUM_KV_HEAD": 6,
            "HIDDEN": 8160, "TP": 6, "SP": 1, "MBS": 1},
}  # fmt: skip


@pytest.mark.parametrize(("key", "block"), BLOCKS.items())
def test_blocks_of_the_documents(key: str, block: dict[str, int], tmp_path: Path) -> None:
    found = aurora(COMMANDS[key].text, tmp_path, COMMANDS[key].hosts).resolved()
    box = report.architecture_box(found.run)
    assert "==== ARCHITECTURE ====" in box
    lines = dict(line.split(": ", 1) for line in box.splitlines() if ": " in line)
    assert {name: lines[name] for name in block} == {k: str(v) for k, v in block.items()}


@pytest.mark.parametrize(("row", "figures"), ROWS_70B.items())
def test_rows_of_the_70b_study(
    row: tuple[int, int, int], figures: tuple[int, int, float | None, float | None], tmp_path: Path
) -> None:
    """Parameters, layout and batch; and TFLOPS from the tokens a GPU took each second."""
    hosts, tp, gas = row
    command = f"GAS={gas}; {PIPELINE_70B.replace('TP=1', f'TP={tp}')}"
    call = aurora(command, tmp_path, hosts)
    assert call.resolved().run.model.seq_length == 8192  # SEQ_LEN is obeyed
    run = call.resolved(*TODAYS_70B).run
    dp, gbs, tflops, tokens = figures
    assert run.parallel.pipeline_parallel == hosts
    assert (run.data_parallel, run.train.global_batch_size) == (dp, gbs)
    assert run.train.activation_checkpointing == "1"
    if tp == 1:
        assert run.parameters == 68_976_648_192
    if tflops and tokens:
        flops = run.architecture.flops_per_token_lm(run.model, 1)
        assert tokens * flops / 1e12 == pytest.approx(tflops, rel=5e-3, abs=0.05)


@pytest.mark.parametrize(("row", "batch"), ROWS_HPZ.items())
def test_rows_of_zero_3_with_hpz(row: tuple[int, int], batch: int, tmp_path: Path) -> None:
    hosts, gas = row
    more = "ZERO_STAGE=3 ZERO_HPZ_PARTITION_SIZE=12"
    command = f"GAS={gas}; {more} {PIPELINE_70B.replace('${NHOSTS}', '1')}"
    run = aurora(command, tmp_path, hosts).resolved().run
    assert (run.data_parallel, run.train.global_batch_size) == (12 * hosts, batch)


def test_rows_of_the_42b_study(tmp_path: Path) -> None:
    for gas, batch in ((1, 16), (2, 32), (4, 64)):
        command = COMMANDS["42B"].text.replace("STEPS=1", f"STEPS={gas}")
        run = aurora(command, tmp_path, 8).resolved("--vocab-size", "32000").run
        assert (run.train.global_batch_size, run.parameters) == (batch, 41_404_500_960)


def test_rows_on_32_hosts(tmp_path: Path) -> None:
    command = f"GAS=16; {PIPELINE_70B.replace('${NHOSTS}', '16')}"
    run = aurora(command, tmp_path, 32).resolved().run
    assert (run.data_parallel, run.train.global_batch_size) == (24, 384)


def test_rows_of_mics(tmp_path: Path) -> None:
    for hosts in (4, 8, 16):
        more = "ZERO_STAGE=3 MICS_SHARD_SIZE=48"
        command = f"GAS=1; {more} {PIPELINE_70B.replace('${NHOSTS}', '1')}"
        run = aurora(command, tmp_path, hosts).resolved().run
        assert (run.data_parallel, run.zero_ranks) == (12 * hosts, 48)


def test_the_spike_skipper(tmp_path: Path) -> None:
    found = aurora(COMMANDS["skip"].text, tmp_path).resolved()
    assert found.run.skip_ranges == ((10, 20), (25, 30))
    assert "10-20,25-30: 17 steps" in report.dry_run_text(found, "")
    odd = COMMANDS["skip"].text.replace(" 30", "")
    with pytest.raises(ConfigError, match=r"3 step numbers \(10 20 25\) do not make pairs"):
        aurora(odd, tmp_path).resolved()


def test_the_length_of_the_published_run(tmp_path: Path) -> None:
    """2 T tokens in steps of 768 x 4096, and the rates of the first three."""
    command = (
        "TRAIN_TOKENS=2T MICRO_BATCH=4 GRAD_ACC_STEPS=8 VOCAB_SIZE=32000 LR=3e-4 bash train_alcf.sh"
    )
    run = aurora(command, tmp_path).resolved().run
    assert (run.train.train_iters, run.train.global_batch_size) == (635_782, 768)
    rates = [f"{learning_rate(step, run.optimizer):.6g}" for step in (1, 2, 3)]
    assert rates == ["9.4372e-09", "1.88744e-08", "2.83116e-08"]


def test_settings_of_the_trainer(tmp_path: Path) -> None:
    command = (
        "MODEL_ARCH=llama3-3B NLAYERS=12 SEQ=8192 DTYPE=bf16 USE_ACTIVATION_CHECKPOINTING=true"
        " ZERO_STAGE=3 OPT=adamw TRAIN_ITERS=100 LOG_INTERVAL=1 LR=5e-5 LR_DECAY_STYLE=linear"
        " LR_WARMUP_FRAC=0 MICRO_BATCH=1 GRAD_ACC_STEPS=1 bash train_alcf.sh"
    )
    for machine, batch in (("aurora", 24), ("polaris", 8)):
        run = typed(command, machine, 2, tmp_path).resolved().run
        assert run.train.global_batch_size == batch
        assert run.tokens_per_step == 8192 * batch
        rates = [learning_rate(step, run.optimizer) for step in (1, 100)]
        assert rates == pytest.approx([5e-5 * 0.99, 0], rel=0.02, abs=1e-12)
    laptop = typed("LR=5e-5 bash train_alcf.sh", "laptop", 1, tmp_path).resolved().run
    assert laptop.optimizer.min_learning_rate == pytest.approx(5e-6)  # not the preset's 3e-4


# Of the published line.
BINDING = "verbose,list:2-4:10-12:18-20:26-28:34-36:42-44:54-56:62-64:70-72:78-80:86-88:94-96"


def test_launch_lines_of_the_documents(tmp_path: Path) -> None:
    """Word by word, but for `--no-vni`, which today's launchers do not know."""
    call = typed(f"CPU_BIND={BINDING} launch python3 -m mine", "aurora", 2, tmp_path)
    words = call.launch_line().split()
    nodes = tmp_path / "nodefile"
    assert {"--envall", "--np=24", "--ppn=12", f"--hostfile={nodes}", f"--cpu-bind={BINDING}"} <= {
        *words
    }
    assert words[0] == "mpiexec" and words[-3:] == ["python3", "-m", "mine"]
    polaris = typed("launch python3 -m ezpz.test_dist", "polaris", 2, tmp_path).launch_line()
    assert {"--np=8", "--ppn=4", "--cpu-bind=depth", "--depth=8"} <= {*polaris.split()}


def test_the_hands_on_sizes(tmp_path: Path) -> None:
    command = (
        "MODEL_ARCH=shakespeare NLAYERS=4 HEADS=4 NUM_KV_HEAD=4 HIDDEN=128 FFN_HIDDEN_SIZE=512"
        " SEQ=64 MICRO_BATCH=12 TRAIN_ITERS=2000 VOCAB_SIZE=65 bash train_alcf.sh"
    )
    run = typed(command, "laptop", 1, tmp_path).resolved().run
    assert run.train.train_tokens == 2000 * 12 * 64
    assert run.model.architecture == "gpt2" and run.model.tie_embeddings
    blocks, padding = 4 * (12 * 128 * 128 + 13 * 128), 128 - 65
    assert run.parameters == blocks + (65 + padding + 64 + 2) * 128


def test_notes_of_the_daily_commands(tmp_path: Path) -> None:
    """What is always so is accepted; other names of a rule and a schedule are taken, and said."""
    found = aurora(COMMANDS["cooldown"].text, tmp_path, 256).resolved()
    assert found.run.optimizer.optimizer == "lamb"
    assert found.run.optimizer.lr_decay_style == "warmup-stable-decay"
    assert found.run.optimizer.lr_decay_fraction == 0.9
    notes = "\n".join(found.notes)
    said = (
        "OPT=ipex.fusedlamb is trained with lamb",
        "the share of LR_DECAY_ITERS that cools",
        "--override-opt_param-scheduler changes nothing",
    )
    for words in said:
        assert words in notes
    overridden, missing = found.warnings
    assert "OVERRIDE_CKPT_OPT_PARAM" in overridden and "LOAD=test_rollback" in missing
    more = aurora(COMMANDS["cpt"].text, tmp_path).resolved()
    assert more.run.checkpoint.finetune and more.run.train.train_tokens >= 22e9
    assert aurora(COMMANDS["mpich"].text, tmp_path).resolved().run.launch.launch_with == "mpiexec"
    assert aurora(COMMANDS["2B"].text, tmp_path, 256).resolved().run.train.train_iters == 92_859

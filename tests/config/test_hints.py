"""Variables that would have no effect are named; others are left alone."""

import pytest

from megatron.config.foreign_variables import FOREIGN_SPELLINGS, NOT_OURS, WITHOUT_EFFECT
from megatron.config.resolve import Site
from megatron.config.schema import by_variable
from megatron.config.strays import found
from tests.config.helpers import refusal, resolved

ORDINARY = (
    "PATH", "HOME", "SHELL", "SHLVL", "USER", "LOGNAME", "HOSTNAME", "LANG", "LC_ALL", "TERM",
    "PWD", "OLDPWD", "EDITOR", "DISPLAY", "PAGER", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH",
    "LD_LIBRARY_PATH", "CONDA_PREFIX", "CC", "CXX", "CFLAGS", "COMPILER", "LOADEDMODULES",
    "MODULEPATH", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT", "NODE_RANK", "OMP_NUM_THREADS", "PBS_JOBID", "PBS_NODEFILE", "SLURM_NTASKS",
    "PMI_SIZE", "NCCL_DEBUG", "CCL_LOG_LEVEL", "WANDB_API_KEY", "WANDB_ENTITY",
    "WANDB_DISABLE_GIT", "HF_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "NO_COLOR",
    "CI", "GITHUB_TOKEN", "SSH_TTY", "HISTSIZE", "HOST", "HOSTTYPE", "MACHTYPE", "OSTYPE",
    "COLUMNS", "LINES", "MAIL", "DEBUGINFOD_URLS", "CONFIG", "NGPUS",
    "HISTFILE", "LOGLEVEL", "LMOD_CMD", "CRAY_CPU_TARGET", "PE_ENV", "ONEAPI_ROOT", "CCL_ROOT",
    "I_MPI_ROOT", "LIBRARY_PATH", "http_proxy", "KMP_AFFINITY", "PYTHONUSERBASE", "SCRATCH", "NODE",
    "NODES", "QUEUE", "NCPUS", "JOB_ID", "PROJECT", "ACCOUNT", "DATADIR", "CACHE_DIR", "LOG_DIR",
    "DEVICE_COUNT", "RNG_SEED", "WORKERS", "HOSTLIST", "NODEFILE", "MACHINEFILE", "MACHINE", "ARCH",
    "MPI_HOME", "MPICC", "TRITON_CACHE_DIR", "TORCH_HOME", "DEEPSPEED_TIMEOUT", "ROCM_PATH",
    "TOKENIZERS_PARALLELISM", "MODULEPATH_ROOT", "DIST_LAUNCH", "WORKING_DIR",
)  # fmt: skip


def test_ordinary_variables_are_left_alone():
    assert found(dict.fromkeys(ORDINARY, "1")) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NLAYER", "NLAYERS"), ("MODLE_ARCH", "MODEL_ARCH"), ("SEQLEN", "SEQ_LEN"),
        ("GAD_ACC_STEPS", "GRAD_ACC_STEPS"),
        ("HIDDEN_SIZE", "HIDDEN"), ("GLOBAL_BATCH_SIZE", "GLOBAL_BATCH"), ("NUM_HEADS", "HEADS"),
        ("LR_WARMUP_FRACTIONS", "LR_WARMUP_FRACTION"), ("DATA_FILE_LISTS", "DATA_FILE_LIST"),
        ("TRAIN_RANGES_TO_SKIP", "TRAIN_RANGE_TO_SKIP"), ("WANDB_DISABLE", "WANDB_DISABLED"),
    ],
)  # fmt: skip
def test_slips_are_named(name, meant):
    warnings = resolved(**{name: "1"}).warnings
    assert warnings == [f"{name}=1 has no effect: the variable is called {meant}"]


def test_variables_of_the_reference_that_are_not_needed():
    assert "NO_LLAMA" in resolved(NO_LLAMA=1).warnings[0]


def test_slips_are_refused_in_a_job_and_named_in_its_dry_run():
    job = Site(in_job=True)
    message = refusal(site=job, NLAYER=4, LEARNING_RATE=1, TORCH_DEVICE="xpu")
    assert "NLAYER=4 has no effect: the variable is called NLAYERS" in message
    assert "IGNORE_VARIABLES=LEARNING_RATE,NLAYER" in message
    assert "TORCH_DEVICE" not in message  # nothing was meant that is not so
    named = resolved(site=job, NLAYER=4)
    *warned, stop = named.warnings
    assert named.in_vain == tuple(warned) != ()
    assert stop.startswith("a real run would stop here with status 2: ")
    assert stop.endswith("IGNORE_VARIABLES=NLAYER")
    ignored = {"IGNORE_VARIABLES": "LEARNING_RATE, NLAYER", "DRY_RUN": "0"}
    run = resolved(site=job, NLAYER=4, LEARNING_RATE=1, **ignored)
    assert run.warnings == [] and run.run.model.num_layers == 4  # the preset's
    assert resolved(NLAYER=4, DRY_RUN=0).in_vain != ()  # a laptop trains and says so


def test_what_another_order_of_data_ignores_is_named():
    warnings = "\n".join(resolved(DATA_CACHE_PATH="x", BLEND_SAMPLE_IN_CORPUS=1).warnings)
    assert "DATA_CACHE_PATH=x has no effect" in warnings
    assert "BLEND_SAMPLE_IN_CORPUS=1 changes nothing" in warnings
    megatron = {"DATA_ORDER": "megatron", "DATA_CACHE_PATH": "x", "BLEND_SAMPLE_IN_CORPUS": 1}
    assert resolved(**megatron).warnings == []


def test_empty_slips_are_unset():
    assert found({"NLAYER": " "}) == []


def test_foreign_spellings_point_at_variables():
    assert set(FOREIGN_SPELLINGS.values()) <= set(by_variable())
    others = [*FOREIGN_SPELLINGS, *WITHOUT_EFFECT, *NOT_OURS]
    assert len(others) == len(set(others))
    assert not set(others) & set(by_variable())


def test_settings_of_another_spike_policy_are_named():
    with_warn = "\n".join(resolved(ROLLBACK_STEPS=7, MAX_ROLLBACKS=9).warnings)
    assert "ROLLBACK_STEPS=7 has no effect here: it is for SPIKE_POLICY=rollback" in with_warn
    assert "MAX_ROLLBACKS=9 has no effect" in with_warn
    off = "\n".join(resolved(SPIKE_POLICY="off", SPIKE_THRESHOLD=5).warnings)
    assert "SPIKE_THRESHOLD=5 has no effect here: it is for SPIKE_POLICY=warn" in off
    used = resolved(SPIKE_POLICY="rollback", ROLLBACK_STEPS=7, SPIKE_THRESHOLD=5)
    assert "has no effect" not in "\n".join(used.warnings)


def test_what_has_no_effect_is_named_as_it_was_written():
    finder = resolved("--lr-finder", "--lr-warmup-iters", "5").warnings
    assert finder == ["--lr-warmup-iters=5 has no effect here: it is for runs without LR_FINDER=1"]
    (saves,) = resolved(LR_FINDER=1, SAVE_INTERVAL=7).warnings
    assert saves.startswith("SAVE_INTERVAL=7 has no effect here: it is for runs that save")
    assert resolved(MUON_MOMENTUM=0.9).warnings == [
        "MUON_MOMENTUM=0.9 has no effect here: it is for OPT=muon"
    ]
    ends = refusal("--weight-decay-incr-style", "linear")
    assert "START_WEIGHT_DECAY and END_WEIGHT_DECAY are not set. Set both, e.g. " in ends


def test_a_dry_run_says_that_load_is_not_there(tmp_path):
    load, here = tmp_path / "nowhere", tmp_path / "run"
    for more in ({}, {"FINETUNE": 1}):
        (stop,) = resolved(LOAD=load, RUN_DIR=here, **more).warnings
        assert f"would stop here with status 4: LOAD={load} does not exist" in stop
    (here / "checkpoints").mkdir(parents=True)
    (here / "checkpoints" / "latest").write_text("step-00000002\n")
    assert resolved(LOAD=load, RUN_DIR=here).warnings == []  # it goes on from its own

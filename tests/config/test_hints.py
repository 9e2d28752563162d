"""Variables that would have no effect are named; others are left alone."""

import pytest

from megatron.config.hints import FOREIGN_SPELLINGS, misspelt_variables
from megatron.config.schema import by_variable
from tests.config.helpers import resolved

ORDINARY = (
    "PATH", "HOME", "SHELL", "SHLVL", "USER", "LOGNAME", "HOSTNAME", "LANG", "LC_ALL", "TERM",
    "PWD", "OLDPWD", "EDITOR", "DISPLAY", "PAGER", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH",
    "LD_LIBRARY_PATH", "CONDA_PREFIX", "CC", "CXX", "CFLAGS", "COMPILER", "LOADEDMODULES",
    "MODULEPATH", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT", "NODE_RANK", "OMP_NUM_THREADS", "PBS_JOBID", "PBS_NODEFILE", "SLURM_NTASKS",
    "PMI_SIZE", "NCCL_DEBUG", "CCL_LOG_LEVEL", "WANDB_API_KEY", "WANDB_NAME", "WANDB_ENTITY",
    "WANDB_DIR", "WANDB_DISABLE_GIT", "HF_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "NO_COLOR",
    "CI", "GITHUB_TOKEN", "SSH_TTY", "HISTSIZE", "HOST", "HOSTTYPE", "MACHTYPE", "OSTYPE",
    "COLUMNS", "LINES", "MAIL", "DEBUGINFOD_URLS", "EZPZ_LOG_LEVEL",
)  # fmt: skip


def test_ordinary_variables_are_left_alone():
    assert misspelt_variables(dict.fromkeys(ORDINARY, "1")) == []


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


def test_empty_slips_are_unset():
    assert misspelt_variables({"NLAYER": " "}) == []


def test_foreign_spellings_point_at_variables():
    assert set(FOREIGN_SPELLINGS.values()) <= set(by_variable())
    assert not set(FOREIGN_SPELLINGS) & set(by_variable())


def test_settings_of_another_spike_policy_are_named():
    with_warn = "\n".join(resolved(ROLLBACK_STEPS=7, MAX_ROLLBACKS=9).warnings)
    assert "ROLLBACK_STEPS=7 has no effect with SPIKE_POLICY=warn" in with_warn
    assert "MAX_ROLLBACKS=9 has no effect" in with_warn
    off = "\n".join(resolved(SPIKE_POLICY="off", SPIKE_THRESHOLD=5).warnings)
    assert "SPIKE_THRESHOLD=5 has no effect with SPIKE_POLICY=off" in off
    used = resolved(SPIKE_POLICY="rollback", ROLLBACK_STEPS=7, SPIKE_THRESHOLD=5)
    assert "has no effect" not in "\n".join(used.warnings)

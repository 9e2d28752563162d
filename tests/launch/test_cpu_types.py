"""What a CPU multiplies slowly, from file systems of CPUs; and what a run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.resolve import Site
from megatron.launch.cpu_types import cpu_flags, slow_types
from tests.config.helpers import configured, refusal, resolved, started

INTEL = "processor\t: 0\nflags\t\t: fpu avx2 avx512f {}\nvmx flags\t: vnmi\n"
SLOW = {"bf16": "bf16 is emulated here", "fp16": "fp16 is emulated here"}
LAPTOP, OTHER = Site(slow_types=SLOW), Site()
SMALL = {"MODEL_ARCH": "SmolLM2-135M", "VOCAB_SIZE": 4096, "TOKENIZER_TYPE": "NullTokenizer"}


@pytest.mark.parametrize(
    ("flags", "environ", "bf16"),
    [
        ("amx_bf16 avx512_bf16", {}, ""),
        ("avx512_bf16", {}, "1.6 times slower"),
        ("", {}, "5 times slower"),
        ("amx_bf16 avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "1.6 times slower"),
        ("amx_bf16 avx512_bf16", {"DNNL_MAX_CPU_ISA": "avx2"}, "5 times slower"),
        ("amx_bf16 avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, ""),
        ("amx_bf16 avx512_bf16", {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, ""),
    ],
)
def test_amx_is_what_makes_16_bits_fast(
    flags: str, environ: dict[str, str], bf16: str, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(INTEL.format(flags))
    found = slow_types(environ, tmp_path)
    assert bool(found) == bool(bf16) and bf16 in found.get("bf16", "")


@pytest.mark.parametrize("text", ["processor : 0\nFeatures : asimd bf16\n", None])
def test_what_is_not_known_is_slow(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(text)
    assert cpu_flags(tmp_path) == frozenset()
    assert set(slow_types({}, tmp_path)) == {"bf16", "fp16"}


def test_a_type_that_the_device_is_fast_at_is_the_default() -> None:
    assert configured(**SMALL, site=OTHER).train.dtype == "bf16"
    found = resolved(**SMALL, site=LAPTOP)
    assert found.run.train.dtype == "fp32"
    assert "DTYPE=fp32, since bf16 is slow here: bf16 is emulated here" in found.notes
    assert not any("DTYPE" in warning for warning in found.warnings)
    debug = resolved(site=LAPTOP)  # its preset has fp32, which needs no word
    assert debug.run.train.dtype == "fp32" and not any("DTYPE" in note for note in debug.notes)
    machine = Site("aurora", True, 1, 0, {"DTYPE": "bf16"}, slow_types=SLOW)
    assert configured(MODEL_ARCH="7B", site=machine).train.dtype == "bf16"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_slow_type_that_is_asked_for_is_taken_with_a_warning(dtype: str) -> None:
    found = resolved(**SMALL, DTYPE=dtype, site=LAPTOP)
    assert found.run.train.dtype == dtype
    assert f"DTYPE={dtype}: {dtype} is emulated here" in found.warnings
    assert not any("DTYPE" in warning for warning in resolved(**SMALL, DTYPE=dtype).warnings)


def test_a_run_keeps_its_type_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for before, here, kept in ((OTHER, LAPTOP, "bf16"), (LAPTOP, OTHER, "fp32")):
        name = {"RUN_NAME": kept, **SMALL}
        folder = started(**name, site=before).run_folder
        assert configured(**name, site=here).train.dtype != kept  # no step yet: nothing to keep
        (folder / "metrics.jsonl").write_text('{"event": "step", "iteration": 1}\n')
        found = resolved(**name, site=here)
        assert found.run.train.dtype == kept
        said = "\n".join(found.warnings if kept == "bf16" else found.notes)
        assert f"DTYPE={kept}, as in this run so far" in said
        assert ("bf16 is emulated here" in said) == (kept == "bf16")
        assert configured(RESUME=str(folder), site=here).train.dtype == kept
        assert configured(RESUME=str(folder), DTYPE="fp16", site=here).train.dtype == "fp16"
        other = {"bf16": "fp32", "fp32": "bf16"}[kept]
        assert f"DTYPE {kept} -> {other}" in refusal(**name, DTYPE=other, site=here)


def test_a_type_that_was_set_is_not_kept_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = started(**SMALL, DTYPE="fp32").run_folder
    (folder / "metrics.jsonl").write_text('{"event": "step", "iteration": 1}\n')
    assert "DTYPE fp32 -> bf16" in refusal(**SMALL)

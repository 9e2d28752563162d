"""Lists of hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.launch.hostlist import expand, read_hostfile, short, unique


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("laptop", ["laptop"]),
        ("a01,b02", ["a01", "b02"]),
        ("nid[001-002],nid007", ["nid001", "nid002", "nid007"]),
        ("nid[001,003-004]", ["nid001", "nid003", "nid004"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("x[9-11].site.org", ["x9.site.org", "x10.site.org", "x11.site.org"]),
        ("a1,a1", ["a1"]),
    ],
)
def test_expand(text: str, hosts: list[str]) -> None:
    assert list(expand(text)) == hosts


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "a[1-2", "a1-2]", "a[2-1]", "a[]", "a[1-]", "a[[1]]"]
)
def test_expand_refuses_what_is_no_list(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        expand(text, "SLURM_JOB_NODELIST")


names = st.text("abcxyz.-", min_size=1, max_size=4).map(lambda text: f"n{text}")
spans = st.tuples(st.integers(0, 120), st.integers(0, 4)).map(
    lambda s: range(s[0], s[0] + s[1] + 1)
)


@given(
    st.lists(
        st.tuples(names, st.lists(spans, min_size=1, max_size=3), st.integers(1, 5)), min_size=1
    )
)
def test_expand_undoes_writing_in_brackets(
    groups: list[tuple[str, list[range], int]],
) -> None:
    """Groups are name[first-last,...], numbers of a fixed width; each comes out once."""
    words, hosts = [], []
    for name, ranges, width in groups:
        inside = ",".join(
            f"{r[0]:0{width}}-{r[-1]:0{width}}" if len(r) > 1 else f"{r[0]:0{width}}"
            for r in ranges
        )
        words.append(f"{name}[{inside}]")
        hosts += [f"{name}{number:0{width}}" for r in ranges for number in r]
    assert list(expand(",".join(words))) == list(dict.fromkeys(hosts))


def test_hostfile_formats(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "# ours\nx1.site.org slots=4\n\nx2:8\nx1.site.org\nx3  # spare\n", encoding="utf-8"
    )
    assert read_hostfile(path, "HOSTFILE") == ("x1.site.org", "x2", "x3")


def test_hostfile_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"HOSTFILE=.*cannot be read"):
        read_hostfile(tmp_path / "missing", "HOSTFILE")
    (tmp_path / "empty").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--hostfile=.*names no host"):
        read_hostfile(tmp_path / "empty", "--hostfile")


def test_short_names() -> None:
    assert short("x4217c2s6b0n0.hsn.cm.aurora.alcf.anl.gov") == "x4217c2s6b0n0"
    assert short("10.1.2.3") == "10.1.2.3"
    assert unique(["b", "a", "b"]) == ("b", "a")

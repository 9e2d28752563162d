"""Data-file lists: parsing, errors with file and line, tokens and epochs."""

import pytest

from megatron.config.errors import DataError
from megatron.data.data_list import parse_data_list, parse_data_stages
from megatron.data.survey import fill, survey_data
from tests.config.helpers import configured, refusal, resolved, write_pair


def _list(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return path


def test_lines(tmp_path):
    path = _list(
        tmp_path,
        "# all of it\n0.5 /data/a books # first\n\n2 /data/b.bin\n1e-3\t/d.bin.idx  wiki\n",
    )
    assert parse_data_list(path) == (
        (0.5, "/data/a", "books", 2, None),
        (2.0, "/data/b", "default", 4, None),
        (0.001, "/d", "wiki", 5, None),
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no data line"), ("# only this\n", "no data line"), ("/data/a\n", ":1: 1 words"),
        ("1 a b c\n", ":1: 4 words"), ("1 a\nx b\n", ":2: weight 'x'"),
        ("0 a\n0.0 b\n", "every line has weight 0"),
        ("1 a b\ncorpus c max_epochs=2\n", ":2: no line has the corpus c; there are: b"),
        ("1 a b\ncorpus b max_epochs=0\n", ":2: .*above 0"),
        ("1 a b\ncorpus b epochs=2\n", ":2: .*max_epochs=NUMBER"),
        ("1 a b\ncorpus b max_epochs=2\ncorpus b max_epochs=3\n", ":3: .*two limits"),
        ("1 a b\nstage 2T c.txt\n", ":2: `stage` lines and data lines do not mix"),
        ("-1 a\n", "0 .* or above"), ("nan a\n", "0 .* or above"), ("inf a\n", "0 .* or above"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, text, word):
    with pytest.raises(DataError, match=word) as error:
        parse_data_list(_list(tmp_path, text), "MY_LIST")
    assert "MY_LIST" in str(error.value) and "list.txt" in str(error.value)


def test_a_line_may_have_weight_zero(tmp_path):
    sources = parse_data_list(_list(tmp_path, "1 x a\n0.0 y b\n"))
    assert [(source.weight, source.prefix) for source in sources] == [(1.0, "x"), (0.0, "y")]


def test_a_limit_is_its_corpus_files(tmp_path):
    path = _list(tmp_path, "corpus b max_epochs=1.5\n1 x a\n1 y b\n1 z b\n")
    assert [source.max_epochs for source in parse_data_list(path)] == [None, 1.5, 1.5]


def test_stages(tmp_path):
    (tmp_path / "a.txt").write_text("1 x\n")
    (tmp_path / "b.txt").write_text("1 y\n2 z\n")
    path = _list(tmp_path, "stage 0 a.txt # first\nstage 1.5T b.txt\nstage 2T a.txt\n")
    stages = parse_data_stages(path)
    assert [stage.start_tokens for stage in stages] == [0, 15 * 10**11, 2 * 10**12]
    assert [stage.path for stage in stages] == [str(tmp_path / f"{n}.txt") for n in "aba"]
    assert [len(stage.sources) for stage in stages] == [1, 2, 1]
    (stage,) = parse_data_stages(tmp_path / "a.txt")
    assert (stage.start_tokens, stage.sources) == (0, parse_data_list(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("stage 1 a.txt\n", ":1: the first stage must start at 0"),
        ("stage 0 a.txt\nstage 0 a.txt\n", ":2: .*put the stages in order"),
        ("stage 0 a.txt\n1 x\n", ":2: .*no other lines"),
        ("stage 0 a.txt\nstage 2Q a.txt\n", ":2: '2Q' is no number of tokens"),
        ("stage 0 gone.txt\n", ":1=.*gone.txt does not exist"),
    ],
)
def test_bad_stages(tmp_path, text, word):
    (tmp_path / "a.txt").write_text("1 x\n")
    with pytest.raises(DataError, match=word):
        parse_data_stages(_list(tmp_path, text), "MY_LIST")


def test_what_a_limited_part_cannot_take_goes_to_the_others():
    inf = float("inf")
    assert fill([1, 1, 2], [inf, 10, inf], 100) == pytest.approx([30, 10, 60])
    assert fill([1, 1], [5, 7], 100) == [5, 7]
    assert fill([1, 3], [inf, inf], 8) == [2, 6]
    assert fill([0, 3, 0], [inf, inf, 5], 8) == [0, 8, 0]


def test_epochs_over_stages_and_limits(tmp_path):
    for name, tokens in (("a", 1000), ("b", 1000)):
        write_pair(tmp_path / name, [tokens])
    one = tmp_path / "one.txt"
    two = tmp_path / "two.txt"
    one.write_text(f"1 {tmp_path}/a a\n1 {tmp_path}/b b\n")
    two.write_text(f"1 {tmp_path}/a a\n1 {tmp_path}/b b\ncorpus a max_epochs=1.5\n")
    path = _list(tmp_path, "stage 0 one.txt\nstage 2K two.txt\n")
    survey = survey_data(str(path), 4000, 1.0, 32)
    a, b = survey.corpora
    assert (a.epochs, a.max_epochs, b.epochs, b.max_epochs) == (1.5, 1.5, 2.5, None)
    assert (a.share, b.share) == (0.375, 0.625)
    assert survey.stages == ((0, str(one)), (2000, str(two)))
    two.write_text(f"1 {tmp_path}/a a\ncorpus a max_epochs=1.5\n")
    (problem,) = survey_data(str(path), 4000, 1.0, 32).problems
    assert "two.txt" in problem and "500 of the 2,000" in problem and "raise max_epochs" in problem


def test_tokens_and_epochs(tmp_path):
    for name, tokens in (("a", 100), ("b", 300), ("c", 400)):
        write_pair(tmp_path / name, [tokens])
    path = _list(tmp_path, f"1 {tmp_path}/a x\n3 {tmp_path}/b x\n4 {tmp_path}/c.bin y\n")
    survey = survey_data(str(path), 1600, 0.5, 32)
    assert survey.problems == ()
    assert survey.corpora == (
        ("x", 2, 0.5, 400, 4.0, None),
        ("y", 1, 0.5, 400, 4.0, None),
    )


def test_a_short_file_is_refused_only_where_the_order_cannot_use_it(tmp_path):
    write_pair(tmp_path / "long", [100])
    write_pair(tmp_path / "short", [20])
    write_pair(tmp_path / "empty", [0])
    lines = f"1 {tmp_path}/long\n1 {tmp_path}/short\n"
    path = str(_list(tmp_path, lines))
    (problem,) = survey_data(path, 64, 1.0, 32).problems
    assert "20 tokens" in problem and "32 + 1" in problem
    assert survey_data(path, 64, 1.0, 32, order="megatron").problems == ()
    _list(tmp_path, lines + f"1 {tmp_path}/empty\n")
    (problem,) = survey_data(path, 64, 1.0, 32, order="megatron").problems
    assert "empty.bin holds no tokens" in problem
    unread = f"1 {tmp_path}/long\n0 {tmp_path}/short\n"
    _list(tmp_path, unread)
    assert survey_data(path, 64, 1.0, 32).problems == ()
    _list(tmp_path, unread + f"1 {tmp_path}/short again\n")
    (problem,) = survey_data(path, 64, 1.0, 32).problems
    assert "list.txt:3:" in problem


@pytest.mark.parametrize(
    "lines", ["stage 0 a.txt\nstage 2K a.txt\n", "1 {a} x\ncorpus x max_epochs=2\n"]
)
def test_stages_and_limits_are_refused_for_megatrons_order(tmp_path, lines):
    write_pair(tmp_path / "a", [100])
    (tmp_path / "a.txt").write_text(f"1 {tmp_path}/a x\n")
    path = str(_list(tmp_path, lines.format(a=tmp_path / "a")))
    assert survey_data(path, 64, 1.0, 32).problems == ()
    (problem,) = survey_data(path, 64, 1.0, 32, order="megatron").problems
    assert "neither stages nor limits" in problem


def test_all_files_are_checked_and_all_problems_said(tmp_path):
    write_pair(tmp_path / "good", [100])
    write_pair(tmp_path / "short", [32])
    path = _list(tmp_path, f"1 {tmp_path}/good\n1 {tmp_path}/gone\n1 {tmp_path}/short\n")
    message = refusal(DATA_FILE_LIST=path, TOKENIZER_TYPE="ByteTokenizer", SEQ=32)
    assert "list.txt:2:" in message and "gone.idx does not exist" in message
    assert "list.txt:3:" in message and "32 tokens" in message and "32 + 1" in message


def test_a_good_list_is_accepted_and_a_dry_run_needs_none(tmp_path):
    from megatron.config.resolve import Site, resolve

    write_pair(tmp_path / "good", [100, 200])
    path = _list(tmp_path, f"1 {tmp_path}/good\n")
    environ = {"DATA_FILE_LIST": str(path), "TOKENIZER_TYPE": "ByteTokenizer"}
    assert resolve(environ, [], Site()).run.checkpoint.run_name == "debug-seq128-list"
    assert resolved(DATA_FILE_LIST="gone.txt", VOCAB_SIZE=256).run.data.data_file_list == "gone.txt"
    assert configured(DATA_FILE_LIST="builtin").data.data_file_list == "builtin"

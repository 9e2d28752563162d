"""Megatron's order against its rules written out slowly, on lists of many kinds."""

import random
from functools import cache

import pytest

from megatron.data.indexed import IndexedDataset
from tests.data.megatron_cases import build, recorded_data, write_pair
from tests.data.slow_order import slow_order

WIKI, WIKI1 = "wiki/part_0_text_document", "wiki/part_1_text_document"
BOOKS, BOOKS1 = "books/part_0_text_document", "books/part_1_text_document"
CODE, ZEROS, ONES = (
    "code/part_1_text_document", "edge/zeros_text_document", "edge/ones_text_document",
)  # fmt: skip
ALL = (WIKI, WIKI1, BOOKS, BOOKS1, CODE, ONES)


def spread(count, seed):
    """A list of `count` corpora, each of 1 to 3 files."""
    draw = random.Random(seed)
    return [
        (draw.random(), draw.choice(ALL), f"{draw.choice('abXY')}-{corpus}")
        for corpus in range(count)
        for _ in range(draw.randint(1, 3))
    ]


MIXED = [(0.5, WIKI, "wiki"), (0.2, WIKI1, "wiki"), (0.3, CODE, "code"), (0.4, BOOKS, "books")]
EQUAL = [(1.0, prefix, f"c{i}") for i, prefix in enumerate((WIKI, BOOKS, CODE))]

# name -> lines, and what differs from the usual run
CASES = {
    "one epoch": ([(1.0, WIKI, "a")], {"train_iters": 20}),
    "last epoch apart": ([(1.0, BOOKS1, "a")], {"train_iters": 100}),
    "last epoch together": ([(1.0, BOOKS1, "a")], {"train_iters": 86}),
    "many epochs": ([(1.0, BOOKS1, "a")], {"train_iters": 400, "seed": 7}),
    "concatenated, not shuffled": (MIXED, {"shuffle": False}),
    "concatenated, shuffled": (MIXED, {"seed": 99}),
    "blended, not shuffled": (MIXED, {"blend": True, "shuffle": False}),
    "blended, shuffled": (MIXED, {"blend": True, "seq_length": 7}),
    "ties between corpora": (EQUAL, {}),
    "ties between files": ([(1.0, p, "one") for p in (WIKI, BOOKS, CODE)], {"blend": True}),
    "ties of two": ([(3.0, WIKI, "b"), (3.0, BOOKS, "a")], {"train_iters": 33}),
    "8 corpora": (spread(8, 1), {"train_iters": 90}),
    "11 corpora": (spread(11, 2), {"train_iters": 90, "blend": True}),
    "14 corpora": (spread(14, 3), {"train_iters": 90}),
    "three equal splits": (MIXED, {"split": (1.0, 1.0, 1.0)}),
    "split with fractions": (MIXED, {"split": (97.0, 1.5, 1.5), "eval_iters": 1}),
    "split that rounds up": ([(1.0, WIKI, "a")], {"split": (33.3, 33.3, 33.4)}),
    "training alone": (MIXED, {"split": (1.0, 0.0, 0.0)}),
    "empty documents": (
        [(1.0, ZEROS, "a"), (0.5, ONES, "b")], {"seq_length": 5, "split": (80.0, 20.0, 0.0)}
    ),
    "tiny documents": ([(1.0, ONES, "a")], {"seq_length": 16}),
    "an empty document first": ([(1.0, "empty/first", "a")], {"split": (1.0, 0.0, 0.0)}),
    "a corpus without requests": (
        [(0.0, WIKI, "aa"), (1.0, BOOKS, "bb"), (1.0, CODE, "cc")], {"train_iters": 60}
    ),
    "a file without requests": ([(0.0, WIKI, "a"), (1.0, BOOKS, "a")], {"blend": True}),
    "a file without samples or requests": (
        [(0.0, "empty/no_tokens", "a"), (0.0, "empty/nothing", "a"), (1.0, BOOKS, "a")],
        {"blend": True},
    ),
    "one token a sample": ([(1.0, ONES, "a"), (1.0, CODE, "a")], {"seq_length": 1}),
    "one long document": ([(1.0, "empty/long", "a")], {"split": (1.0, 0.0, 0.0)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    folder = recorded_data()
    write_pair(folder / "empty/first", [0, 0, 9, 30, 0, 4])
    write_pair(folder / "empty/no_tokens", [0] * 40)
    write_pair(folder / "empty/nothing", [])
    write_pair(folder / "empty/long", [5000])
    return folder


@cache
def read(prefix):
    dataset = IndexedDataset(prefix)
    return [dataset.sequence(i).tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("name", CASES)
def test_the_order_follows_the_rules(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    lines, changes = CASES[name]
    case = {
        "list": lines, "split": (90.0, 8.0, 2.0), "seed": 1234, "seq_length": 16,
        "train_iters": 40, "global_batch_size": 8, "eval_interval": 20, "eval_iters": 2,
        "blend": False, "shuffle": True, **changes,
    }  # fmt: skip
    same = ("seed", "seq_length", "train_iters", "global_batch_size", "eval_interval")
    splits = build(
        tmp_path,
        lines,
        shares=case["split"],
        eval_iters=case["eval_iters"],
        blend_in_corpus=case["blend"],
        shuffle_in_corpus=case["shuffle"],
        **{key: case[key] for key in same},
    )
    expected = slow_order(case, read)
    for split in ("train", "valid", "test"):
        dataset = getattr(splits, split)
        assert (dataset is None) == (split not in expected)
        if dataset is None:
            continue
        assert len(dataset) == len(expected[split])
        for k, wanted in enumerate(expected[split]):
            sample = dataset.sample(k)
            found = (sample.corpus, sample.file, sample.index, sample.tokens.tolist())
            assert found == wanted, f"{split} sample {k}"
            place = dataset.locate(k)
            assert (place.corpus, place.file, place.index) == wanted[:3]


def test_the_cases_are_what_they_are_called(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def facts(name):
        lines, changes = CASES[name]
        index = build(tmp_path, lines, **changes).train.corpora[0].indices[0]
        found = index.open(print)
        return found.facts["epochs"], found.arrays["shuffle"]

    assert facts("one epoch")[0] == 1
    assert facts("many epochs")[0] >= 10
    for name, apart in (("last epoch apart", True), ("last epoch together", False)):
        epochs, shuffle = facts(name)
        last = len(shuffle) * (epochs - 1) // epochs
        assert epochs > 1 and (shuffle[:last].max() <= last) == apart


def test_the_pieces_of_a_sample_are_its_tokens(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    lines = [(1.0, ZEROS, "a"), (0.5, ONES, "b")]
    train = build(tmp_path, lines, shares=(80.0, 20.0, 0.0)).train
    for k in range(0, len(train), 3):
        file, reader, number = train.find(k)
        tokens = []
        for document, offset, length in reader.parts(number):
            tokens += read(file.prefix)[document][offset : offset + length]
        assert tokens == train.sample(k).tokens.tolist()

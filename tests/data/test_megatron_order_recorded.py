"""Megatron's order against orders recorded from Megatron-DeepSpeed's own data code."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron.data.megatron_order.mixing import corpus_weights
from megatron.data.megatron_order.requests import samples_wanted, split_text
from tests.data import reference_names
from tests.data.megatron_cases import build, recorded_data

CASES = json.loads((Path(__file__).parent / "golden_order" / "cases.json").read_text())["cases"]
NAMES = ("train", "valid", "test")


def crc(values, dtype="<i8") -> int:
    return zlib.crc32(np.ascontiguousarray(values, dtype=dtype).tobytes())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_recorded_value(case, tmp_path, monkeypatch):
    monkeypatch.chdir(recorded_data())  # the names of cache files hold the prefixes as written
    inputs = case["inputs"]
    run = {key: inputs[key] for key in ("train_iters", "global_batch_size", "eval_interval")}
    run["eval_iters"] = inputs["eval_iters"]
    shares = tuple(float(share) for share in inputs["split"].split(","))
    assert split_text(shares) == inputs["split"]
    assert list(samples_wanted(**run)) == case["requested"]
    splits = build(
        tmp_path,
        inputs["list"],
        shares=shares,
        seed=inputs["seed"],
        seq_length=inputs["seq_length"],
        blend_in_corpus=inputs["blend_sample_in_corpus"],
        shuffle_in_corpus=inputs["shuffle_sample_in_corpus"],
        exact_epochs=inputs.get("train_data_exact_num_epochs"),
        **run,
    )
    for name in NAMES:
        dataset = getattr(splits, name)
        if dataset is None:
            assert name not in case["splits"]
        else:
            check_split(dataset, inputs, case["splits"][name])


def check_split(dataset, inputs, recorded):
    plan = dataset.plan
    assert len(dataset) == recorded["size"]
    check_files(dataset, inputs, recorded)
    assert [corpus.name for corpus in dataset.corpora] == recorded["corpora"]
    sizes = [corpus.size for corpus in plan.corpora]
    assert sizes == recorded["corpus_sizes"]
    for corpus, sums in zip(dataset.corpora, recorded["corpus_order_crc32"], strict=True):
        arrays = corpus.order
        assert [crc(arrays["sources"]), crc(arrays["numbers"])] == sums
    weights = corpus_weights(sizes, plan.train_total)
    assert [weight.hex() for weight in weights.tolist()] == recorded["weights_hex"]
    sources, numbers = dataset.blend["sources"], dataset.blend["numbers"]
    assert sources[:200].tolist() == recorded["dataset_index"]
    assert numbers[:200].tolist() == recorded["dataset_sample_index"]
    assert crc(sources) == recorded["dataset_index_crc32"]
    assert crc(numbers) == recorded["dataset_sample_index_crc32"]
    check_names(dataset, inputs, recorded, weights)
    samples = [dataset.sample(k).tokens for k in range(len(dataset))]
    shown = [[crc(tokens), *tokens[:4].tolist()] for tokens in samples]
    assert shown[:200] == recorded["first"] and shown[-20:] == recorded["last"]
    assert crc([values[0] for values in shown], "<u4") == recorded["all_samples_crc32"]


def in_list_order(dataset, inputs):
    """(corpus, place in it) of each list line."""
    corpora = {corpus.name: corpus for corpus in dataset.corpora}
    seen = dict.fromkeys(corpora, -1)
    for _, _, name in inputs["list"]:
        seen[name] += 1
        yield corpora[name], seen[name]


def check_files(dataset, inputs, recorded):
    lines = list(in_list_order(dataset, inputs))
    plans = [corpus.files[place] for corpus, place in lines]
    assert [plan.request for plan in plans] == recorded["requests"]
    indices = [corpus.indices[place].open(print) for corpus, place in lines]
    assert [index.facts["epochs"] for index in indices] == recorded["epochs"]
    assert [index.facts["samples"] for index in indices] == recorded["file_samples"]
    names = {"doc_idx": "documents", "sample_idx": "samples", "shuffle_idx": "shuffle"}
    for index, expected in zip(indices, recorded["file_arrays"], strict=True):
        for theirs, ours in names.items():
            array = index.arrays[ours]
            found = [array.dtype.str, list(array.shape), zlib.crc32(array.tobytes())]
            assert found == expected[theirs], theirs


def check_names(dataset, inputs, recorded, weights):
    seq, seed = inputs["seq_length"], inputs["seed"]
    files = [
        reference_names.file_name(
            prefix, dataset.plan.name, request, epochs, seq, seed, inputs["split"]
        )
        for (_, prefix, _), request, epochs in zip(
            inputs["list"], recorded["requests"], recorded["epochs"], strict=True
        )
    ]
    assert files == recorded["file_cache_md5"]
    corpora = dataset.plan.corpora
    names = [reference_names.corpus_name(corpus.name, corpus.size) for corpus in corpora]
    assert names == recorded["corpus_cache_md5"]
    descriptions = [
        reference_names.corpus_description(
            [file.prefix for file in corpus.files], corpus.size, seq, seed
        )
        for corpus in corpora
    ]
    name = reference_names.blend_name(descriptions, weights, len(dataset))
    assert name == recorded["blend_cache_md5"]

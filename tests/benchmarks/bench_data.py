#!/usr/bin/env python3
"""Times the data path beside its peers, in alternating rounds; prints medians as a table.

    python3 tests/benchmarks/bench_data.py preprocess|start|latency|waiting [--rounds N]

preprocess: tokens/s of tools/preprocess_data.py, of a plain `encode_batch` writer, and of a pool
that is handed a document at a time. start: from a list of 2,419 files to the first sample, in the
stateless order, by building the index of DATA_ORDER=megatron, and that of megatron-core where
--megatron-core says where it is (pip install --no-deps --target DIR megatron-core). latency: one
sample of 8,192. waiting: share of the time that steps of 20 ms wait for their data.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, not installed

import numpy as np

from megatron.data.data_list import DataSource, ListStage
from megatron.data.dataset import Dataset
from megatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype, write_index
from megatron.data.loader import Loader, StepPlan
from megatron.data.megatron_order.datasets import build_megatron_datasets
from megatron.data.megatron_order.settings import OrderSettings
from megatron.data.prepare.builtin import code_documents, prose_documents
from megatron.data.prepare.tokenizer import build_tokenizer
from megatron.data.splits import build_datasets, build_stages

ROOT = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
VOCAB_SIZE = 32_000
CHARACTERS = 60_000_000  # of code; its docstrings, as documents of their own, are a fifth more
FILES, CORPORA = 2_419, 14
TOKENS_A_FILE, TOKENS_A_DOCUMENT = 8_000_000, 700
SEQ_LENGTH = 8192
Contender = Callable[[], float]  # one round; returns its seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5, help="of each contender, in turn")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--datatrove", metavar="PYTHON", help="preprocess: one that has it")
    parser.add_argument("--megatron-core", metavar="DIR", help="start: a peer to time as well")
    options = parser.parse_args(arguments)
    benchmark = BENCHMARKS[options.what]
    if options.what == "start":
        benchmark = partial(start, core=options.megatron_core)
    elif options.what == "preprocess":
        benchmark = partial(preprocess, datatrove=options.datatrove)
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.folder) as folder:
        benchmark(Path(folder), options.rounds)
    return 0


def rounds(contenders: dict[str, Contender], count: int) -> dict[str, list[float]]:
    """Seconds of each contender, one after the other in each round; a round before is not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name, contender in contenders.items():
            spent = contender()
            if number:
                seconds[name].append(spent)
    return seconds


def table(seconds: dict[str, list[float]], unit: str, value: Callable[[float], float]) -> None:
    """A row a contender: the median, all rounds, and the median ratio of the first to it."""
    first = next(iter(seconds.values()))
    print(f"| | {unit}, median | rounds | time / time of the first, median |\n|---|---|---|---|")
    for name, spent in seconds.items():
        shown = " ".join(f"{value(s):,.4g}" for s in spent)
        ratio = statistics.median(s / f for s, f in zip(spent, first, strict=True))
        print(f"| {name} | {value(statistics.median(spent)):,.4g} | {shown} | {ratio:,.2f} |")


def preprocess(folder: Path, count: int, datatrove: str | None = None) -> None:
    """Tokenising the text of the installed Python packages with a byte-level BPE of 32,000 ids."""
    code = code_documents(Path(np.__file__).parents[1], CHARACTERS)
    documents = [*code, *prose_documents(code, CHARACTERS)]
    source = folder / "text.jsonl"
    with source.open("w") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
    model = _train(folder / "tokenizer", documents[::10])
    output = folder / "out"
    contenders = {
        "tools/preprocess_data.py --workers 2": partial(_ours, source, model, output),
        "encode_batch of 1,000 documents, 2 threads": partial(_batches, source, model, output),
        "pool of 2, a document at a time": partial(_pool, source, model, output),
    }
    if datatrove:
        contenders["datatrove, 2 tasks"] = partial(_datatrove, datatrove, source, model, output)
    tokens = set()
    for contender in contenders.values():
        contender()
        pairs = [IndexedDataset(str(index)[:-4]) for index in sorted(output.glob("*.idx"))]
        tokens.add(b"".join(pair.tokens.tobytes() for pair in pairs))
    assert len(tokens) == 1, "the contenders disagree"
    total = len(tokens.pop()) // 2
    size = source.stat().st_size / 1e6
    print(f"{len(documents):,} documents, {size:.1f} MB, {total:,} tokens", flush=True)
    table(rounds(contenders, count), "tokens/s", lambda seconds: total / seconds)


def _train(folder: Path, documents: list[str]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)


def _ours(source: Path, model: str, output: Path) -> float:
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(source),
        "--tokenizer-type", "HFTokenizer", "--tokenizer-model", model, "--append-eod",
        "--output-prefix", str(output / "ours"), "--workers", "2",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.findall(r"tokens in ([\d.]+) s", done.stderr)
    return float(found[-1])  # from the loaded tokenizer on, as the others; with its workers' start


def _batches(source: Path, model: str, output: Path) -> float:
    """In a process of its own, as the others; the tokenizer is loaded before the clock starts."""
    return _process(_write_batches, source, model, output, {"RAYON_NUM_THREADS": "2"})


def _pool(source: Path, model: str, output: Path) -> float:
    return _process(_write_pool, source, model, output, {"TOKENIZERS_PARALLELISM": "false"})


def _datatrove(python: str, source: Path, model: str, output: Path) -> float:
    """It works by whole files: each process has one, of half the text."""
    shutil.rmtree(output, ignore_errors=True)
    halves = source.with_name("halves")
    if not halves.exists():
        halves.mkdir()
        lines = source.read_text().splitlines(keepends=True)
        sizes = np.cumsum([len(line) for line in lines])
        middle = int(np.searchsorted(sizes, sizes[-1] / 2))
        (halves / "0.jsonl").write_text("".join(lines[:middle]))
        (halves / "1.jsonl").write_text("".join(lines[middle:]))
    script = str(ROOT / "tests/benchmarks/bench_data_peer.py")
    done = subprocess.run(
        [python, script, "datatrove", str(halves), f"{model}/tokenizer.json", str(output)],
        check=True, env={**os.environ, "RAYON_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def _process(
    function: Callable[..., float], source: Path, model: str, output: Path, environ: dict[str, str]
) -> float:
    shutil.rmtree(output, ignore_errors=True)
    code = (
        f"from tests.benchmarks.bench_data import {function.__name__} as f; "
        f"print(f({str(source)!r}, {model!r}, {str(output)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, **environ},
        capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout)


def _texts(source: str) -> Iterator[str]:
    with open(source) as file:
        for line in file:
            yield json.loads(line)["text"]


def _write_batches(source: str, model: str, output: str) -> float:
    tokenizer = build_tokenizer("HFTokenizer", model)
    start = time.perf_counter()
    texts = list(_texts(source))
    with IndexedWriter(f"{output}/plain", token_dtype(tokenizer.vocab_size)) as writer:
        for first in range(0, len(texts), 1000):
            for ids in tokenizer.encode_batch(texts[first : first + 1000]):
                writer.add_document([*ids, tokenizer.eod])
    return time.perf_counter() - start


_TOKENIZER: list[Any] = []


def _start_pool(model: str) -> None:
    _TOKENIZER.append(build_tokenizer("HFTokenizer", model))


def _encode_one(line: str) -> list[int]:
    return _TOKENIZER[0].encode(json.loads(line)["text"])


def _write_pool(source: str, model: str, output: str) -> float:
    tokenizer = build_tokenizer("HFTokenizer", model)
    start = time.perf_counter()
    with (
        multiprocessing.get_context("fork").Pool(2, _start_pool, (model,)) as pool,
        open(source) as file,
        IndexedWriter(f"{output}/pool", token_dtype(tokenizer.vocab_size)) as writer,
    ):
        for ids in pool.imap(_encode_one, file, 32):
            writer.add_document([*ids, tokenizer.eod])
    return time.perf_counter() - start


def start(folder: Path, count: int, core: str | None = None) -> None:
    """2,419 files with real numbers of documents; their tokens are holes, which nobody reads."""
    entries = list(_sparse_files(folder))
    tokens = FILES * TOKENS_A_FILE
    print(f"{FILES:,} files, {CORPORA} corpora, {tokens:,} tokens, "
          f"{tokens // TOKENS_A_DOCUMENT:,} documents")  # fmt: skip
    settings = OrderSettings(
        entries=tuple(entries),
        seq_length=SEQ_LENGTH,
        shares=(990, 10, 0),
        seed=1234,
        train_iters=tokens // SEQ_LENGTH // 768,
        global_batch_size=768,
        eval_interval=0,
        eval_iters=0,
    )

    def stateless() -> float:
        began = time.perf_counter()
        splits = build_stages([ListStage(0, "list", tuple(entries))], SEQ_LENGTH)
        assert splits.train is not None
        splits.train.sample(0)
        return time.perf_counter() - began

    def indexed() -> float:
        cache = Path(tempfile.mkdtemp(dir=folder))
        began = time.perf_counter()
        build_megatron_datasets(settings, cache, lambda line: None).train.sample(0)
        spent = time.perf_counter() - began
        shutil.rmtree(cache)
        return spent

    def peer() -> float:
        cache = tempfile.mkdtemp(dir=folder)
        samples = settings.train_iters * settings.global_batch_size
        script = str(ROOT / "tests/benchmarks/bench_data_peer.py")
        place = [str(core), str(folder / "prefixes")]
        done = subprocess.run(
            [sys.executable, script, "megatron-core", *place, str(samples), str(SEQ_LENGTH), cache],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        shutil.rmtree(cache)
        return float(done.stdout.splitlines()[-1])

    contenders = {"stateless": stateless, "DATA_ORDER=megatron, cold cache": indexed}
    if core:
        (folder / "prefixes").write_text("\n".join(entry.prefix for entry in entries))
        contenders["megatron-core, cold cache, 2 threads"] = peer
    table(rounds(contenders, count), "seconds", lambda seconds: seconds)


def _sparse_files(folder: Path) -> Iterator[DataSource]:
    for number in range(FILES):
        prefix = folder / f"part{number}"
        documents = TOKENS_A_FILE // TOKENS_A_DOCUMENT
        lengths = np.full(documents, TOKENS_A_DOCUMENT, dtype="<i4")
        with tempfile.TemporaryFile() as table_file, open(f"{prefix}.idx", "wb") as index:
            table_file.write(lengths.tobytes())
            table_file.flush()
            write_index(index, np.dtype("<u2"), table_file)
        with open(f"{prefix}.bin", "wb") as file:
            file.truncate(2 * int(lengths.sum()))
        yield DataSource(1.0, str(prefix), f"corpus{number % CORPORA}", number + 1)


def latency(folder: Path, count: int) -> None:
    """`dataset.sample(k)` in order and at random places, from the page cache."""
    train = _small_mix(folder)
    for k in range(4000):
        train.sample(k)
    places = np.random.default_rng(0).integers(0, 4000, 4000).tolist()

    def read(order: Sequence[int]) -> float:
        began = time.perf_counter()
        for k in order:
            train.sample(k)
        return (time.perf_counter() - began) / len(order)

    contenders = {"in order": partial(read, range(4000)), "at random": partial(read, places)}
    table(rounds(contenders, count), "microseconds a sample", lambda seconds: seconds * 1e6)


def waiting(folder: Path, count: int) -> None:
    """Steps of 20 ms that take 2 micro-batches of 4 samples of 8,192 from the loader."""
    train, steps, step_s = _small_mix(folder), 200, 0.020

    def share() -> float:
        plan = StepPlan(8, 4, 2, data_parallel_rank=0, data_parallel_size=1)
        with Loader(train, plan, [(i + 1, 8 * i) for i in range(steps + 1)]) as loader:
            next(loader), next(loader)  # the first read is start-up
            waited, began = loader.waited_s, time.perf_counter()
            for _ in range(steps):
                next(loader), next(loader)
                time.sleep(step_s)  # the model, elsewhere than on this core
            return (loader.waited_s - waited) / (time.perf_counter() - began)

    shares = [share() for _ in range(count)]
    shown = " ".join(f"{100 * value:.3f}" for value in shares)
    print(f"waiting for data: {100 * statistics.median(shares):.3f}% of the time ({shown})")


def _small_mix(folder: Path) -> Dataset:
    """A corpus a file, 28 million tokens in all: they stay in the page cache."""
    entries = []
    for number in range(CORPORA):
        prefix = str(folder / f"corpus{number}")
        with IndexedWriter(prefix, np.dtype("<u2")) as writer:
            writer.add_document(np.random.default_rng(number).integers(0, 60000, 2_000_000))
        entries.append(DataSource(1.0 + number, prefix, f"corpus{number}", number + 1))
    train = build_datasets(entries, SEQ_LENGTH).train
    assert train is not None
    return train


BENCHMARKS = {"preprocess": preprocess, "start": start, "latency": latency, "waiting": waiting}

if __name__ == "__main__":
    sys.exit(main())

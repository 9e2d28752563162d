"""Global sample k of a split, looked up in the cached arrays and read from its file."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.dataset import Sample, SampleLocation
from megatron.data.indexed import DocumentPart, file_dtype
from megatron.data.indexed_header import HEADER
from megatron.data.megatron_order.array_file import ArrayFile
from megatron.data.megatron_order.build_once import CacheFile, Log
from megatron.data.megatron_order.settings import FilePlan, SplitPlan
from megatron.data.samples import FilePool, Tokens

Arrays = Mapping[str, npt.NDArray[Any]]  # of a cached file, by name

_POINTER, _TWO_POINTERS = struct.Struct("<q"), struct.Struct("<2q")


class FileReader:
    """The samples of one file in one split, for all list entries and corpora that name it.

    Its cached index and `.idx` are read in places, as its tokens are: maps of thousands of files
    would need more descriptors than a process has.
    """

    def __init__(self, plan: FilePlan, index: ArrayFile, pool: FilePool) -> None:
        """Read by the cached `index`."""
        self._plan = plan
        self._index = index
        self._pool = pool
        self._dtype = file_dtype(plan.header.dtype)

    def locate(self, number: int) -> tuple[int, int]:
        """Pass over the documents, and row of the sample index, of sample `number`."""
        row = self._row(number)
        position = int(self._rows("samples", row, row + 1)[0, 0])
        return position // len(self._plan.documents), row

    def parts(self, number: int) -> list[DocumentPart]:
        """Where the tokens of sample `number` lie, in order; some parts may be empty."""
        return [part for part, _ in self._spans(number)]

    def read(self, number: int) -> Tokens:
        """Tokens of sample `number`, int64 of shape (S + 1,)."""
        size = self._dtype.itemsize
        parts = [
            self._pool.read(f"{self._plan.prefix}.bin", token * size, part.length * size)
            for part, token in self._spans(number)
            if part.length
        ]
        return np.frombuffer(b"".join(parts), dtype=self._dtype).astype(np.int64)

    def _spans(self, number: int) -> list[tuple[DocumentPart, int]]:
        """The parts of sample `number`, each with its first token's place in the file."""
        row = self._row(number)
        (first, begin), (last, end) = self._rows("samples", row, row + 2).tolist()
        spans = []
        for document in self._rows("documents", first, last + 1).tolist():
            start, stop = self._extent(document)
            spans.append((DocumentPart(document, begin, stop - start - begin), start + begin))
            begin = 0
        # The last token of a sample is also the first of the next.
        final, token = spans.pop()
        return [*spans, (final._replace(length=end + 1 - final.offset), token)]

    def _row(self, number: int) -> int:
        return int(self._rows("shuffle", number, number + 1)[0])

    def _rows(self, name: str, first: int, stop: int) -> npt.NDArray[Any]:
        """Rows [first, stop) of an array of the index."""
        dtype, shape, offset = self._index.table[name]
        row = dtype.itemsize * math.prod(shape[1:])
        data = self._pool.read(str(self._index.path), offset + first * row, (stop - first) * row)
        return np.frombuffer(data, dtype).reshape(-1, *shape[1:])

    def _extent(self, document: int) -> tuple[int, int]:
        """First token of a document in `.bin`, and the first after it: where the next begins."""
        header = self._plan.header
        offset = HEADER.size + 4 * header.sequences + 8 * document
        if document + 1 < header.sequences:
            data = self._pool.read(f"{self._plan.prefix}.idx", offset, 16)
            start, stop = _TWO_POINTERS.unpack(data)
            return start // self._dtype.itemsize, stop // self._dtype.itemsize
        (start,) = _POINTER.unpack(self._pool.read(f"{self._plan.prefix}.idx", offset, 8))
        return start // self._dtype.itemsize, header.tokens


class _Readers:
    """Readers of files, whose indices are checked at first use."""

    def __init__(self, pool: FilePool, log: Log) -> None:
        self._pool = pool
        self._log = log
        self._readers: dict[str, FileReader] = {}
        self._lock = threading.Lock()

    def get(self, plan: FilePlan, index: CacheFile) -> FileReader:
        with self._lock:
            reader = self._readers.get(index.key)
            if reader is None:
                reader = FileReader(plan, index.open(self._log), self._pool)
                self._readers[index.key] = reader
            return reader


@dataclass(frozen=True)
class CorpusOrder:
    """One corpus: its order, and the cached index of each file (None where never read)."""

    name: str
    files: tuple[FilePlan, ...]
    indices: tuple[CacheFile | None, ...]
    order: Arrays | None  # None for a corpus without samples


class MegatronDataset:
    """One split: a fixed order over as many samples as the run was planned to need."""

    def __init__(
        self,
        plan: SplitPlan,
        corpora: Sequence[CorpusOrder],
        blend: Arrays,
        log: Log,
        pool: FilePool,
    ) -> None:
        """Look samples up in `blend`, then in the order of their corpus."""
        self.plan = plan
        self.corpora = tuple(corpora)
        self.blend = blend
        self._log = log
        self._readers = _Readers(pool, log)

    def __len__(self) -> int:
        """Samples of the split, a little more than the run needs."""
        return self.plan.size

    def sample(self, k: int) -> Sample:
        """Sample `k` of the split.

        Raises:
            DataError: the order has no such sample, or a file cannot be read.
        """
        file, reader, number = self.find(k)
        epoch, row = reader.locate(number)
        return Sample(file.corpus, file.prefix, epoch, row, tokens=reader.read(number))

    def locate(self, k: int) -> SampleLocation:
        """Where sample `k` comes from; `index` is its row in the file's sample index."""
        file, reader, number = self.find(k)
        return SampleLocation(file.corpus, file.prefix, *reader.locate(number))

    def uses(self, prefix: str, document: int) -> list[int]:
        """The samples, ascending, that hold tokens of a document (a sequence) of a file."""
        found = [np.empty(0, dtype=np.int64)]
        for number, corpus in enumerate(self.corpora):
            for place, (file, index) in enumerate(zip(corpus.files, corpus.indices, strict=True)):
                if index is None or corpus.order is None or file.prefix != prefix:
                    continue
                numbers = _samples_with(index.open(self._log).arrays, document)
                order, blend = corpus.order, self.blend
                own = np.flatnonzero(
                    (order["sources"] == place) & np.isin(order["numbers"], numbers)
                )
                found.append(
                    np.flatnonzero((blend["sources"] == number) & np.isin(blend["numbers"], own))
                )
        return sorted(np.concatenate(found).tolist())

    def find(self, k: int) -> tuple[FilePlan, FileReader, int]:
        """The file of sample `k`, its reader, and the sample's number in the file's order."""
        if not 0 <= k < len(self):
            raise DataError(
                f"{self.plan.name} sample {k} is needed, but DATA_ORDER=megatron was planned "
                f"for {len(self)} samples; raise TRAIN_ITERS (which changes the order)"
            )
        corpus = self.corpora[int(self.blend["sources"][k])]
        own = int(self.blend["numbers"][k])
        assert corpus.order is not None
        place = int(corpus.order["sources"][own])
        file, index = corpus.files[place], corpus.indices[place]
        assert index is not None, f"{file.prefix} has no samples"
        return file, self._readers.get(file, index), int(corpus.order["numbers"][own])


def _samples_with(index: Arrays, document: int) -> npt.NDArray[Any]:
    """Numbers, in a file's order, of its samples with tokens of a document that has any."""
    places = index["samples"][:, 0]  # of each sample's first token, then of the last sample's end
    rows = [np.empty(0, dtype=np.int64)]
    for place in np.flatnonzero(index["documents"] == document):
        # A sample reaches from its first token to that of the next one, which it holds too.
        first = np.searchsorted(places[1:], place, side="left")
        stop = np.searchsorted(places[:-1], place, side="right")
        rows.append(np.arange(first, stop))
    return np.flatnonzero(np.isin(index["shuffle"], np.concatenate(rows)))

"""The tokenizer of a run: rank 0 loads it, the other ranks know what they need of it.

Loading takes seconds and, for a name of the hub, requests; thousands of ranks need three values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron.config.errors import ConfigError
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.parallel.control import Control


@dataclass(frozen=True)
class KnownTokenizer:
    """A tokenizer of rank 0, without its text.

    Attributes:
        vocab_size: one above its largest id.
        eod: its id that ends a document.
        digest: its fingerprint.
    """

    vocab_size: int
    eod: int
    digest: str

    def fingerprint(self) -> str:
        """Hash of what defines the ids."""
        return self.digest

    def encode(self, text: str) -> NoReturn:
        """Only rank 0 has text."""
        raise AssertionError("only rank 0 has loaded the tokenizer")

    def encode_batch(self, texts: Sequence[str]) -> NoReturn:
        """Only rank 0 has text."""
        self.encode("")

    def decode(self, ids: Sequence[int]) -> NoReturn:
        """Only rank 0 has text."""
        self.encode("")


def shared_tokenizer(load: Callable[[], Tokenizer], control: Control) -> Tokenizer:
    """What `load` gives on rank 0, and a `KnownTokenizer` of it elsewhere; a collective.

    Raises:
        ConfigError: it cannot be loaded; raised on all ranks.
    """
    loaded: Tokenizer | None = None
    known: KnownTokenizer | None = None
    failed: ConfigError | None = None
    if control.rank == 0:
        try:
            loaded = load()
            known = KnownTokenizer(loaded.vocab_size, loaded.eod, loaded.fingerprint())
        except ConfigError as error:
            failed = error
    known, failed = control.broadcast((known, failed))
    if failed is not None:
        raise failed
    assert known is not None
    return loaded or known

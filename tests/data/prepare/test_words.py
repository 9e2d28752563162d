"""Ids by looking up words are the tokenizer's ids, for any text; in doubt nothing is looked up."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.prepare import words
from megatron.data.prepare.builtin import train_sentencepiece
from megatron.data.prepare.plain_tokenizers import ByteTokenizer
from megatron.data.prepare.tokenizer import Tokenizer, build_tokenizer
from megatron.data.prepare.words import WordEncoder, borders
from tests.data.prepare.bpe import KINDS, write_tokenizer

SOURCE = Path(__file__).read_text()
TEXTS = [SOURCE, "the quick brown fox didn't jump over 12 lazy dogs.  It was 3.14 o'clock!\n" * 20]


def make(folder: Path, kind: str) -> Tokenizer:
    if kind == "sentencepiece":
        path = folder / "sp.model"
        path.write_bytes(train_sentencepiece([TEXTS], 400))
        return build_tokenizer("SentencePieceTokenizer", str(path))
    return build_tokenizer("HFTokenizer", write_tokenizer(folder / kind, kind, TEXTS))


@pytest.fixture(scope="module", params=[*KINDS, "sentencepiece"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return make(tmp_path_factory.mktemp("tokenizer"), request.param)


pieces = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "'s", "'", "'LL", "the", "fox", "def", "12", "3", ".", "...",
     "(", ")", "<|endoftext|>", "<0x41>", "\u00e9", "e\u0301", "\u0301", "\u2581", "\u4f60",
     "\u00a0", "\u3000", "\U0001f600", "_", "a1b", "\x00", "\x7f", "X"]
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(texts=st.lists(st.lists(pieces, max_size=30).map("".join) | st.text(), max_size=4))
def test_any_text_gets_the_ids_of_the_tokenizer(tokenizer, texts):
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    assert encoder.borders is not None
    expected = [np.asarray(tokenizer.encode(t), "<u2").tobytes() for t in texts]
    assert encoder.encode(texts) == expected  # while it learns
    assert encoder.encode(texts[::-1]) == expected[::-1]  # and when it knows


ascii_text = st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x7f'.,(_12aBsz<|"), max_size=60)


@settings(max_examples=250, deadline=None)
@given(text=ascii_text)
def test_ascii_text_of_any_shape(tokenizer, text):
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    expected = [np.asarray(tokenizer.encode(text), "<u2").tobytes()]
    assert encoder.encode([text]) == expected
    assert encoder.encode([text]) == expected


def test_which_tokenizers_are_cut_how(tmp_path):
    assert [borders(make(tmp_path, kind)).words is not None for kind in KINDS] == [
        True, True, True, False,
    ]  # fmt: skip


def test_real_text(tokenizer):
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    for path in sorted(Path(words.__file__).parent.glob("*.py")):
        text = path.read_text()
        assert encoder.encode([text]) == [np.asarray(tokenizer.encode(text), "<u2").tobytes()]


def test_a_tokenizer_that_merges_over_spaces_is_asked_for_all(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    backend = Backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(TEXTS, trainer)  # no borders: "the quick" may be one token
    folder = Path(write_tokenizer(tmp_path / "t", "gpt2", TEXTS))
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = build_tokenizer("HFTokenizer", str(folder))
    assert None is borders(tokenizer)
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    assert encoder.encode(TEXTS[1:]) == [np.asarray(tokenizer.encode(TEXTS[1]), "<u2").tobytes()]
    assert None is borders(ByteTokenizer())


@pytest.mark.parametrize("change", ["lstrip", "rstrip", "single_word", "space"])
def test_added_tokens_that_reach_over_spaces_forbid_it(tmp_path, change):
    import json

    folder = Path(write_tokenizer(tmp_path / "t", "gpt2", TEXTS))
    definition = json.loads((folder / "tokenizer.json").read_text())
    token = definition["added_tokens"][0]
    if change == "space":
        definition["added_tokens"].append({**token, "id": len(definition["model"]["vocab"]),
                                           "content": "lazy dogs"})  # fmt: skip
    else:
        token[change] = True
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert None is borders(build_tokenizer("HFTokenizer", str(folder)))


def test_what_is_kept_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "KEPT_WORDS", 50)
    encoder = WordEncoder(tokenizer, np.dtype("<u2"))
    for i in range(300):
        text = f"word{i} number{i * 7} and x"
        assert encoder.encode([text]) == [np.asarray(tokenizer.encode(text), "<u2").tobytes()]
        assert len(encoder._words) + len(encoder._pieces) < 60

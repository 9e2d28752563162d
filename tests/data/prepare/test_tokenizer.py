"""Every tokenizer: round trip, nothing added, end of document, vocabulary, fingerprint."""

import json

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import TOKENIZER_TYPES
from megatron.data.prepare.builtin import train_sentencepiece
from megatron.data.prepare.plain_tokenizers import END_OF_TEXT, CharTokenizer
from megatron.data.prepare.tokenizer import TOKENIZERS, build_tokenizer
from megatron.data.vocabulary_size import vocabulary_size

LINES = [f"def f{i}(x, y):  return x * {i} + y  # the quick brown fox {i % 7}" for i in range(400)]
TEXTS = ["def f1(x):\n    return x\n", "", "na\u00efve \u4f60\u597d", "  two  spaces  "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of each kind that needs files, all trained on the lines above."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp.model").write_bytes(train_sentencepiece([["\n".join(LINES)]], 400))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        LINES, vocab_size=400, special_tokens=[END_OF_TEXT], show_progress=False
    )
    (folder / "gpt2").mkdir()
    bpe.save_model(str(folder / "gpt2"))
    # As Llama's tokenizers do: a token before every text, which documents must not have.
    bpe.post_processor = TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder / "hf")
    CharTokenizer.write_alphabet("".join([*LINES, *TEXTS]), str(folder / "alphabet.json"))
    return folder


MODELS = {
    "HFTokenizer": "hf",
    "SentencePieceTokenizer": "sp.model",
    "Llama2Tokenizer": "sp.model",
    "GPT2BPETokenizer": "gpt2",
    "CharTokenizer": "alphabet.json",
    "ByteTokenizer": None,
}


@pytest.fixture(params=MODELS)
def tokenizer(request, folder):
    model = MODELS[request.param]
    return build_tokenizer(request.param, str(folder / model) if model else None)


def test_round_trip_and_nothing_added(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eod not in ids
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("kind", MODELS)
def test_the_configuration_knows_the_same_size(kind, folder):
    model = str(folder / MODELS[kind]) if MODELS[kind] else None
    assert vocabulary_size(kind, model, {}) == build_tokenizer(kind, model).vocab_size


def test_every_configurable_type_can_be_built():
    assert set(TOKENIZER_TYPES) <= set(TOKENIZERS)


def test_fingerprints_tell_tokenizers_apart_and_know_copies(folder, tmp_path):
    prints = {}
    for kind, model in MODELS.items():
        path = str(folder / model) if model else None
        prints[kind] = build_tokenizer(kind, path).fingerprint()
    assert prints["Llama2Tokenizer"] == prints["SentencePieceTokenizer"]  # the same ids
    assert prints["GPT2BPETokenizer"] == prints["HFTokenizer"]  # one BPE in two kinds of file
    assert len(set(prints.values())) == len(MODELS) - 2
    (tmp_path / "copy.model").write_bytes((folder / "sp.model").read_bytes())
    copy = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "copy.model"))
    assert copy.fingerprint() == prints["SentencePieceTokenizer"]
    (tmp_path / "other.model").write_bytes(train_sentencepiece([["\n".join(LINES)]], 399))
    other = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "other.model"))
    assert other.fingerprint() != prints["SentencePieceTokenizer"]


def test_equal_vocabulary_with_other_merges_is_another_tokenizer(folder, tmp_path):
    merges = (folder / "gpt2" / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:40]) + "\n")
    (tmp_path / "vocab.json").write_bytes((folder / "gpt2" / "vocab.json").read_bytes())
    pair = f"{tmp_path}/vocab.json,{tmp_path}/merges.txt"
    one, two = (build_tokenizer("GPT2BPETokenizer", m) for m in (str(folder / "gpt2"), pair))
    assert one.vocab_size == two.vocab_size
    assert one.fingerprint() != two.fingerprint()


def test_ends_of_documents(folder):
    assert build_tokenizer("ByteTokenizer").eod == 256
    chars = build_tokenizer("CharTokenizer", str(folder / "alphabet.json"))
    assert chars.eod == chars.vocab_size - 1
    pieces = json.loads((folder / "gpt2" / "vocab.json").read_text())
    assert build_tokenizer("GPT2BPETokenizer", str(folder / "gpt2")).eod == pieces[END_OF_TEXT]
    assert build_tokenizer("HFTokenizer", str(folder / "hf")).eod == pieces[END_OF_TEXT]
    assert build_tokenizer("SentencePieceTokenizer", str(folder / "sp.model")).eod == 2


def test_null_reads_numbers():
    null = build_tokenizer("NullTokenizer", None, 100)
    assert (null.encode("5 98 0"), null.vocab_size, null.eod) == ([5, 98, 0], 100, 99)
    assert null.decode([5, 98]) == "5 98"
    for text in ("5 x", "100", "-1"):
        with pytest.raises(DataError):
            null.encode(text)


def test_a_character_outside_the_alphabet_is_named(folder):
    with pytest.raises(DataError, match=r"U\+0416"):
        build_tokenizer("CharTokenizer", str(folder / "alphabet.json")).encode("x\u0416")


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("Nonesuch", None, "known: .*ByteTokenizer"),
        ("HFTokenizer", None, "needs TOKENIZER_MODEL"),
        ("SentencePieceTokenizer", "/no/such.model", "is not a file"),
        ("SentencePieceTokenizer", __file__, "not a SentencePiece model"),
        ("GPT2BPETokenizer", "/", "vocab.json"),
        ("CharTokenizer", __file__, "alphabet"),
        ("NullTokenizer", None, "VOCAB_SIZE"),
    ],
)
def test_a_bad_model_is_refused_by_its_variable(kind, model, message):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(kind, model)


@pytest.mark.parametrize(
    "content", ['["a", "b"]', '["a", "a", "<|endoftext|>"]', '["<|endoftext|>"]', "{}"]
)
def test_a_bad_alphabet_is_refused(tmp_path, content):
    (tmp_path / "alphabet.json").write_text(content)
    with pytest.raises(ConfigError, match=r"alphabet\.json"):
        build_tokenizer("CharTokenizer", str(tmp_path / "alphabet.json"))


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        build_tokenizer("SentencePieceTokenizer", "x")

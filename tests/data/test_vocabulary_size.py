"""Vocabulary sizes from names and from files."""

import json

import pytest

from megatron.config.errors import ConfigError
from megatron.data.vocabulary_size import sentencepiece_size, vocabulary_size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("google/gemma-7b", 256000), ("google/gemma-7B", 256000), ("google/gemma-2-9b-it", 256000),
        ("meta-llama/Llama-2-7b-hf", 32000), ("meta-llama/Llama-2-70b-chat-hf", 32000),
        ("meta-llama/Meta-Llama-3-8B", 128256), ("meta-llama/Llama-3.2-1B-Instruct", 128256),
        ("HuggingFaceTB/SmolLM3-3B", 128256), ("HuggingFaceTB/SmolLM2-1.7B", 49152),
        ("gpt2", 50257), ("openai-community/gpt2-xl", 50257),
    ],
)  # fmt: skip
def test_names(name, size):
    assert vocabulary_size("HFTokenizer", name, {"HOME": "/nowhere"}) == size


def _tokenizer_json(folder, pieces, added):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model": {"vocab": pieces}, "added_tokens": [{"id": number} for number in added]}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_folder_of_hugging_face(tmp_path):
    _tokenizer_json(tmp_path / "table", {"a": 0, "b": 4}, [5, 6])
    _tokenizer_json(tmp_path / "list", [["a", 0.0], ["b", -1.0]], [0])
    assert vocabulary_size("HFTokenizer", str(tmp_path / "table"), {}) == 7
    assert vocabulary_size("HFTokenizer", str(tmp_path / "list"), {}) == 2


def test_cache_of_hugging_face(tmp_path):
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    _tokenizer_json(snapshot, {"a": 0, "b": 1}, [8])
    for environ in (
        {"HF_HOME": str(tmp_path)},
        {"HF_HUB_CACHE": str(tmp_path / "hub")},
        {"HF_HOME": "/nowhere", "HF_HUB_CACHE": str(tmp_path / "hub")},
    ):
        assert vocabulary_size("HFTokenizer", "some/model", environ) == 9
    with pytest.raises(ConfigError, match="VOCAB_SIZE"):
        vocabulary_size("HFTokenizer", "some/model", {"HF_HOME": "/nowhere"})


def test_gpt2_files(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2}))
    for model in (
        tmp_path,
        tmp_path / "vocab.json",
        f"{tmp_path / 'vocab.json'},{tmp_path / 'm.txt'}",
    ):
        assert vocabulary_size("GPT2BPETokenizer", str(model), {}) == 3
    assert vocabulary_size("GPT2BPETokenizer", None, {}) == 50257


def test_characters(tmp_path):
    (tmp_path / "chars.json").write_text(json.dumps(["a", "b", "<|endoftext|>"]))
    assert vocabulary_size("CharTokenizer", str(tmp_path / "chars.json"), {}) == 3


def _piece(text: bytes) -> bytes:
    inner = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf"  # piece, score (float)
    return b"\x0a" + bytes([len(inner)]) + inner


def test_sentencepiece_protobuf(tmp_path):
    trainer = b"\x12\x04\x08\x96\x01\x20"  # another message; its content looks like fields
    model = b"".join(_piece(text) for text in (b"a", b"bc", b"def")) + trainer
    assert sentencepiece_size(model) == 3
    (tmp_path / "tokenizer.model").write_bytes(model)
    for kind in ("SentencePieceTokenizer", "Llama2Tokenizer"):
        assert vocabulary_size(kind, str(tmp_path / "tokenizer.model"), {}) == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        (tmp_path / "tokenizer.model").write_bytes(model[:-2])
        vocabulary_size("Llama2Tokenizer", str(tmp_path / "tokenizer.model"), {})


def test_sentencepiece_as_the_library_writes_it(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text(
        "\n".join(f"some words of line {number} {number * 7919}" for number in range(300))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=9
    )
    assert vocabulary_size("SentencePieceTokenizer", str(tmp_path / "m.model"), {}) == 60


@pytest.mark.parametrize("content", ["not json", "[]", '{"model": {}}', '{"a": "b"}'])
def test_broken_files_are_config_errors(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="VOCAB_SIZE"):
        vocabulary_size("HFTokenizer", str(tmp_path), {})

"""Byte-level BPE tokenizers of the kinds in use, trained small, saved as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("gpt2", "llama3", "smollm2", "gemma")
END = "<|endoftext|>"


def write_tokenizer(folder: Path, kind: str, texts: list[str], vocab_size: int = 600) -> str:
    """Trains and saves; returns the folder."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "gemma"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        # Trained on words, used without word borders.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        alphabet = sorted({c for text in texts for c in text.replace(" ", "\u2581")})
    special = [END] + [f"<0x{i:02X}>" for i in range(256)] * (kind == "gemma")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(special),
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "gemma":
        tokenizer.pre_tokenizer = None
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return str(folder)

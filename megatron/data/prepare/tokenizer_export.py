"""A run's tokenizer as files that Hugging Face's AutoTokenizer opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron.data.prepare.tokenizer import HFTokenizer, build_tokenizer, builtin_model

_SENTENCEPIECE = ("SentencePieceTokenizer", "Llama2Tokenizer", "BuiltinTokenizer")


def export_tokenizer(kind: str, model: str | None, folder: Path) -> int | None:
    """Writes the tokenizer's files into a model's folder.

    Args:
        kind: TOKENIZER_TYPE.
        model: TOKENIZER_MODEL.
        folder: where config.json lies.

    Returns:
        The id that ends a document; None where transformers has no such kind (bytes, characters,
        plain numbers), and nothing was written.
    """
    if kind == "HFTokenizer":
        assert model is not None
        tokenizer = HFTokenizer(model)
        tokenizer.save(folder)
        return tokenizer.eod
    if kind not in _SENTENCEPIECE:
        return None
    model = model or builtin_model()
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    eod = build_tokenizer("SentencePieceTokenizer", model).eod
    shutil.copyfile(model, folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        # Llama's models put a space before the text, others do not: ask this one.
        "add_prefix_space": processor.encode("a", out_type=str)[0].startswith("\u2581"),
        "clean_up_tokenization_spaces": False,
        "eos_token": processor.id_to_piece(eod),
        "unk_token": processor.id_to_piece(processor.unk_id()),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return eod

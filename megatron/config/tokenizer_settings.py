"""Tokenizer and vocabulary of a run: the user's, its data's, the built-in one, or the usual one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.config import text_settings
from megatron.config.errors import ConfigError, DataError
from megatron.config.option import Draft
from megatron.config.resumed import ResumedRun
from megatron.data import data_list, tokenizer_note
from megatron.data.own_text import BUILTIN_TOKENIZER
from megatron.data.vocabulary_size import vocabulary_size

KIND, TOKENIZER, VOCABULARY = text_settings.KIND, text_settings.TOKENIZER, text_settings.VOCABULARY
DEFAULT = ("HFTokenizer", "google/gemma-7b")


def fill_tokenizer(
    draft: Draft, environ: Mapping[str, str], before: ResumedRun | None
) -> list[str]:
    """Fill tokenizer, vocabulary and, of a user's own text, the list that is made of it.

    Returns:
        What the user should know.

    Raises:
        ConfigError: the vocabulary is not known.
        DataError: the data was made with several tokenizers, or its tokenizer is gone.
    """
    chosen = KIND in draft.given or TOKENIZER in draft.given
    own, notes = text_settings.fill(draft, before), []
    remembered = None if chosen or own else _of_data(draft)
    if own:
        draft.replace(KIND, own.tokenizer_type, _source(draft, KIND, "DATA's"))
        draft.replace(TOKENIZER, own.tokenizer_model, _source(draft, TOKENIZER, "DATA's"))
    elif remembered:
        prefix, note = remembered
        source = f"its data's: {tokenizer_note.note_path(prefix)}"
        draft.replace(KIND, note.kind, source)
        draft.replace(TOKENIZER, tokenizer_note.model_of(note, prefix), source)
        named = " ".join(filter(None, (note.kind, draft.get(TOKENIZER))))
        notes.append(f"tokenizer {named}, as {tokenizer_note.note_path(prefix)} says")
    elif not chosen and draft.get(text_settings.LIST) == data_list.BUILTIN:
        draft.replace(KIND, BUILTIN_TOKENIZER, "the built-in corpus has its own")
        draft.replace(TOKENIZER, None, "the built-in corpus has its own")
    elif chosen and TOKENIZER not in draft.given and draft.get(KIND) != DEFAULT[0]:
        draft.replace(TOKENIZER, None, "default")
    else:
        if TOKENIZER in draft.given and KIND not in draft.given:
            draft.replace(KIND, DEFAULT[0], "default")
        draft.fill(KIND, DEFAULT[0], "default")
        draft.fill(TOKENIZER, DEFAULT[1], "default")
    known = bool(chosen or own or remembered)
    if VOCABULARY not in draft.given and (known or draft.get(VOCABULARY) is None):
        found = _vocabulary(draft, environ, remembered[1].vocab_size if remembered else None)
        draft.replace(VOCABULARY, found, f"tokenizer {draft.get(TOKENIZER) or draft.get(KIND)}")
    return notes


def _source(draft: Draft, key: str, otherwise: str) -> str:
    return draft.sources[key] if key in draft.given else otherwise


def _vocabulary(draft: Draft, environ: Mapping[str, str], noted: int | None) -> int:
    """By name or files; the data's note knows it of tokenizers that are not on this machine."""
    try:
        return vocabulary_size(draft.get(KIND), draft.get(TOKENIZER), environ)
    except ConfigError:
        if noted is None:
            raise
        return noted


def _of_data(draft: Draft) -> tuple[str, tokenizer_note.Note] | None:
    """A pair of the list and its note, where the notes name one tokenizer; None where none does."""
    path = draft.get(text_settings.LIST)
    if path == data_list.BUILTIN or not Path(path).is_file():
        return None
    try:
        stages = data_list.parse_data_stages(path)
    except DataError:
        return None  # the survey shows what is wrong
    prefixes = {source.prefix: None for stage in stages for source in stage.sources}
    return tokenizer_note.one_note(prefixes)

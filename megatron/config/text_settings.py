"""DATA in the configuration: which list and tokenizer it stands for (data/own_text.py)."""

from __future__ import annotations

from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.config.option import Draft
from megatron.config.resumed import ResumedRun
from megatron.config.schema import RunConfig
from megatron.data.own_text import BUILTIN_TOKENIZER, MODEL, OwnText, own_text

DATA, KEY, LIST, CACHE = "data.data", "data.data_key", "data.data_file_list", "data.cache_path"
KIND, TOKENIZER, VOCABULARY = "data.tokenizer_type", "data.tokenizer_model", "model.vocab_size"
_NUMBERS = "NullTokenizer"  # its vocabulary is VOCAB_SIZE


def fill(draft: Draft, before: ResumedRun | None) -> OwnText | None:
    """Fill in the list that DATA is made into; None without DATA.

    A run that is resumed keeps what was prepared for it while that is there, whatever has become of
    the text.

    Raises:
        ConfigError: DATA and DATA_FILE_LIST are both set.
        DataError: there is no such text.
    """
    if DATA not in draft.given:
        return None
    if LIST in draft.given:
        raise ConfigError(
            f"{draft[DATA]} and {draft[LIST]} are both set: DATA is text that is prepared first, "
            "DATA_FILE_LIST names tokens; unset one of them"
        )
    asked = [key for key in (DATA, KEY, KIND, TOKENIZER) if key in draft.given]
    if before and all(before.values.get(key) == draft.get(key) for key in asked):
        kept = before.values.get(LIST)
        if kept and Path(kept).is_file():
            draft.replace(LIST, kept, f"prepared from {draft[DATA]}")
            kind, model = before.values[KIND], before.values.get(TOKENIZER)
            return OwnText(draft.get(DATA), (), 0, 0, "", kind, model, None, Path(kept).stem,
                           str(Path(kept).parent))  # fmt: skip
    kind = draft.get(KIND) if KIND in draft.given else None
    model = draft.get(TOKENIZER) if TOKENIZER in draft.given else None
    if model and kind is None:
        kind = "HFTokenizer"
    folder = draft.get("checkpoint.run_dir")
    runs = Path(folder).parent if folder else Path("runs")
    cache = Path(draft.get(CACHE) or runs / "data-cache")
    vocabulary = draft.get(VOCABULARY) if kind == _NUMBERS else None
    own = own_text(
        draft.get(DATA), draft.get(KEY), kind or BUILTIN_TOKENIZER, model, vocabulary, cache
    )
    draft.replace(LIST, own.data_file_list, f"prepared from {draft[DATA]}")
    return own


def of_run(run: RunConfig) -> OwnText | None:
    """What a run's DATA stands for now; None without DATA, or where its list is there.

    Raises:
        DataError: the text is gone.
    """
    data = run.data
    if data.data is None or Path(data.data_file_list).is_file():
        return None
    folder = Path(data.data_file_list).parent
    model = data.tokenizer_model
    return own_text(
        data.data,
        data.data_key,
        data.tokenizer_type,
        None if model == str(folder / MODEL) else model,
        run.model.vocab_size if data.tokenizer_type == _NUMBERS else None,
        folder.parent,
    )

"""Data sets of the Hugging Face Hub, row by row as they come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from megatron.config.errors import ConfigError, DataError
from megatron.data.hub_names import require_data_set
from megatron.data.text_files import HUB, hub_parts


def rows(given: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the Hub, streamed in its order.

    Args:
        given: `hub:NAME[:CONFIG[:SPLIT]]`.
        keys: columns that are needed.

    Raises:
        ConfigError: `datasets` is missing, or the Hub cannot be reached.
        DataError: there is no such data set, configuration, split or column.
    """
    name, config, split = hub_parts(given, "DATA")
    if find_spec("datasets") is None:
        raise ConfigError(
            f"{given} needs the library datasets: run `python3 -m pip install datasets`"
        )
    require_data_set(given, os.environ)
    datasets = import_module("datasets")
    try:
        found = datasets.load_dataset(name, config, split=split, streaming=True)
        columns = found.column_names
        if columns is not None and (missing := [key for key in keys if key not in columns]):
            raise DataError(
                f"{given} has no column {', '.join(missing)}; it has {', '.join(columns)}: set "
                "DATA_KEY (--json-keys) to the one with the text"
            )
        yield from (found.select_columns(list(keys)) if columns else found)
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{given} cannot be read ({type(error).__name__}: {reason}); write "
            f"{HUB}NAME:CONFIG:SPLIT"
        ) from error

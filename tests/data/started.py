"""What a run says of its data before step 1: the start of a run without its model."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Site, resolve
from megatron.parallel.control import make_control
from megatron.training.run_data import build_data


def start(settings: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and message of a refusal; (0, "") where the data is good."""
    try:
        build_data(resolve(settings, [], Site()).run, make_control())
    except (ConfigError, DataError) as error:
        return error.exit_status, str(error)
    return 0, ""

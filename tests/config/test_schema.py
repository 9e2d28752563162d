"""The schema is the only place an option is named, and its value survives JSON."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.config import schema, table
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig, by_flag, by_variable, options
from tests.config.helpers import configured


def test_names_are_unique():
    assert len(by_variable()) == sum(len(option.env) for option in options())
    assert len(by_flag()) == sum(len(option.flags) for option in options())


def test_every_option_has_a_flag_and_a_help_line():
    for option in options():
        assert option.flags and option.help and option.kind in ("int", "float", "bool", "str")


def test_defaults_keep_their_own_limits():
    for option in options():
        if option.default is not None and option.kind != "bool":
            assert option.checked(option.default, option.name) == option.default


def test_a_new_line_in_the_schema_is_a_new_option(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Extended(schema.LogConfig):
        answer: int = schema.option(42, "ANSWER", "--answer", "the answer", most=99)

    monkeypatch.setitem(schema.SECTIONS, "log", Extended)
    for cached in (options, by_variable, by_flag):
        cached.cache_clear()
    from megatron.config.schema import by_key

    by_key.cache_clear()
    try:
        assert configured().log.answer == 42
        assert configured(ANSWER=7).log.answer == 7
        assert configured("--answer", "8", ANSWER=7).log.answer == 8
        assert "`ANSWER`" in table.options_table() and "the answer" in table.help_text()
        with pytest.raises(ConfigError, match=r"ANSWER=100.*at most 99"):
            configured(ANSWER=100)
    finally:
        for cached in (options, by_variable, by_flag, by_key):
            cached.cache_clear()


def test_from_dict_refuses_what_it_does_not_know():
    values = configured().to_dict()
    with pytest.raises(ConfigError, match="nosuch"):
        RunConfig.from_dict({**values, "nosuch": {}})
    with pytest.raises(ConfigError, match="unknown fields nosuch"):
        RunConfig.from_dict({**values, "model": {**values["model"], "nosuch": 1}})
    with pytest.raises(ConfigError, match="no section 'train'"):
        RunConfig.from_dict({name: value for name, value in values.items() if name != "train"})
    with pytest.raises(ConfigError, match=r"model\.num_layers has no value"):
        RunConfig.from_dict({**values, "model": {**values["model"], "num_layers": None}})


def test_the_value_is_frozen():
    run = configured()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.num_layers = 5


def test_the_table_names_everything_once():
    rows = table.options_table().splitlines()
    assert len(rows) == len(options()) + 2
    assert all(row.count(" | ") == 3 for row in rows[2:])
    for option in options():
        assert any(f"`{option.name}`" in row for row in rows)
        assert option.flags[0] in table.help_text()

"""The configuration while it is being resolved: values, with where each came from."""

from __future__ import annotations

from typing import Any

from megatron.config import schema


class Draft:
    """Values by option key; the first to fill a key wins, so fill in order of precedence."""

    def __init__(self) -> None:
        """Start empty."""
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.given: dict[str, str] = {}  # key -> the variable or flag that the user set

    def give(self, key: str, value: Any, name: str) -> None:
        """A value that the user set under `name`; an earlier one stays."""
        if key not in self.values:
            self.given[key] = name
            self.fill(key, value, name)

    def fill(self, key: str, value: Any, source: str) -> None:
        """A value from elsewhere, unless there is one."""
        if value is not None and key not in self.values:
            self.values[key] = value
            self.sources[key] = source

    def replace(self, key: str, value: Any, source: str) -> None:
        """A value derived from what the user set, in the place of a default."""
        self.values[key] = value
        self.sources[key] = source

    def replace_zero(self, key: str, value: Any, source: str) -> None:
        """A value in the place of none or 0."""
        if not self.values.get(key):
            self.replace(key, value, source)

    def rewrite(self, key: str, value: Any) -> None:
        """Another spelling of the value that is there."""
        self.values[key] = value

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self.values.get(key)

    def name(self, key: str) -> str:
        """The name under which the user set it, else its canonical one."""
        return self.given.get(key, schema.by_key()[key].name)

    def show(self, key: str) -> str:
        """`NAME=value` for messages."""
        return f"{self.name(key)}={self.values.get(key)}"

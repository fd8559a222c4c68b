"""Typed reading of JSON of unknown origin."""

from __future__ import annotations

import math
from typing import Any

from localization_heads.errors import UsageError, shown


class Fields:
    """Typed access to a JSON object of unknown origin: anything unexpected is a `UsageError`."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise UsageError(f"{where} must be an object with named fields, not {type(data).__name__}")
        self.values: dict[str, Any] = data
        self.where = where

    def get(self, name: str) -> object:
        if name not in self.values:
            raise UsageError(f"{self.where}: '{name}' is missing")
        return self.values[name]

    def integer(self, name: str, least: int = 0) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        """A finite number within the limits, or none."""
        return None if self.get(name) is None else self.required_number(name, least, most)

    def number_if_given(self, name: str, least: float = -math.inf, most: float = math.inf) -> float | None:
        return None if self.values.get(name) is None else self.required_number(name, least, most)

    def required_number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not (abs(value) < 1e300 and least <= value <= most):  # also refuses NaN and integers too large
            raise self._wrong(name, "finite" if most == math.inf else f"between {least:g} and {most:g}")
        return float(value)

    def sequence(self, name: str) -> list[object]:
        value = self.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def _wrong(self, name: str, wanted: str) -> UsageError:
        return UsageError(f"{self.where}: '{name}' must be {wanted}, not {shown(self.values[name])}")

"""Checks of single arguments: each returns the value, or raises an error that says why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from math import isnan
from typing import Any, TypeVar

from flexkv.common.config_keys import kind_of
from flexkv.common.errors import ConfigError

E = TypeVar("E", bound=Enum)


def is_integer(value: Any) -> bool:
    """Return whether a value is one integer, of Python or of another library."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    if getattr(value, "ndim", 0) != 0 or "bool" in str(getattr(value, "dtype", "")):
        return False
    try:
        value.__index__()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return True


def integer(field: str, value: Any) -> int:
    """Return an integer as Python's own.

    Raises:
        ConfigError: the value is not an integer; `field` names the argument.
    """
    if not is_integer(value):
        raise ConfigError(field, _shown(value), "must be an integer")
    return int(value)


def index(field: str, value: Any, count: int) -> int:
    """Return an integer as Python's own, if it is one of `count` numbers from 0 on.

    Raises:
        ConfigError: the value is not an integer, or out of range.
    """
    number = integer(field, value)
    if not 0 <= number < count:
        raise ConfigError(field, value, f"must be from 0 to {count - 1}")
    return number


def integers(field: str, values: Any) -> list[int]:
    """Return one or several integers as a list.

    Raises:
        ConfigError: a value is not an integer.
    """
    if is_integer(values):
        return [int(values)]
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(field, _shown(values), "must be an integer or a list of integers")
    try:
        found = list(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            field, kind_of(values), f"must be an integer or a list: {error}"
        ) from error
    return [integer(f"{field}[{number}]", value) for number, value in enumerate(found)]


def seconds(field: str, value: Any) -> float:
    """Return a time in seconds.

    Raises:
        ConfigError: the value is not a number.
    """
    if isinstance(value, bool | str | bytes):
        raise ConfigError(field, _shown(value), "must be a number of seconds")
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(field, _shown(value), "must be a number of seconds") from error
    if isnan(found):
        raise ConfigError(field, found, "must be a number of seconds")
    return found


def flag(field: str, value: Any) -> bool:
    """Return a truth value as a bool.

    Raises:
        ConfigError: the value is not a truth value.
    """
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise ConfigError(field, _shown(value), "must be True or False")
    return bool(value)


def member(field: str, value: Any, kind: type[E]) -> E:
    """Return a value that must be a member of an enumeration.

    Raises:
        ConfigError: the value is not a member of `kind`.
    """
    if not isinstance(value, kind):
        names = ", ".join(f"{kind.__name__}.{each.name}" for each in kind)
        raise ConfigError(field, _shown(value), f"must be one of {names}")
    return value


def text(field: str, value: Any) -> str:
    """Return a value that must be a string.

    Raises:
        ConfigError: the value is not a string, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise ConfigError(field, _shown(value), "must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            field, ascii(value[:80]), f"cannot be encoded as UTF-8: {error.reason}"
        ) from error
    return value


def _shown(value: Any) -> object:
    """Return what an error may show of a value: a short value itself, otherwise only its kind."""
    if value is None or isinstance(value, bool | int | float | Enum):
        return value if not isinstance(value, int) or abs(value) < 1 << 64 else kind_of(value)
    if isinstance(value, str) and len(value) <= 40:
        return value
    return kind_of(value)

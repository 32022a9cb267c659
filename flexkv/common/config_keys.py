"""What every configuration model shares: keys with facts, old names, refusals, one kind of error.

The pydantic field definitions are the only table of keys. `key` adds to a field what pydantic has
no word for (its unit, its old names, the part of the system that serves it), and everything else
reads it from there: the checks below, the loader of files, and `docs/configuration.md`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from flexkv.common.errors import ConfigError

MASK = "**********"
"""Stands where a secret would be shown: the same ten stars that pydantic shows."""

Renames: TypeAlias = dict[str, str]
"""Old name → current name."""


class RetiredKeyWarning(FutureWarning):
    """A configuration uses a name or value that has a newer form."""


class KeyFacts(NamedTuple):
    """What a key's definition says beyond its type, default and description."""

    unit: str = ""
    old: tuple[str, ...] = ()
    """Retired names that mean the same."""
    part: str = ""
    """The part of the system that values outside `built` need, and that is not there yet."""
    built: tuple[object, ...] = ()
    retired: str = ""
    """Why the key itself is retired, and what to use; such a key is accepted with a warning."""
    variables: tuple[str, ...] = ()
    """Environment variables that set the key, beside `FLEXKV_<KEY>`."""
    secret: bool = False
    shown_default: str = ""
    """The default in words, where it follows from other keys."""


def key(default: object, description: str, **options: Any) -> Any:
    """Define one configuration key: a pydantic field with its `KeyFacts` attached.

    Args:
        default: its value when nobody gives one.
        description: what it does, for the reader of `docs/configuration.md`.
        options: any of the `KeyFacts`; the rest are rules for `pydantic.Field`.
    """
    facts = {name: options.pop(name) for name in KeyFacts._fields if name in options}
    return Field(default, description=description, json_schema_extra=facts, **options)


def facts_of(field: FieldInfo) -> KeyFacts:
    """Give the facts that `key` attached to a field."""
    extra: Any = field.json_schema_extra
    return KeyFacts(**(extra or {}))


def old_names(models: Iterable[type[BaseModel]]) -> Renames:
    """Give every retired name of these models' keys with its current name."""
    return {
        old: name
        for model in models
        for name, field in model.model_fields.items()
        for old in facts_of(field).old
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """Give the known name that looks most like `name`."""
    return get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def shown(name: str, value: object, models: Iterable[type[BaseModel]]) -> object:
    """Give the value as an error may show it: a secret is masked."""
    fields = (model.model_fields.get(name) for model in models)
    return MASK if any(field and facts_of(field).secret for field in fields) else value


def current_names(
    values: Mapping[str, Any], models: tuple[type[BaseModel], ...]
) -> tuple[dict[str, Any], Renames]:
    """Give the values under their keys' current names, and the renames that took.

    Raises:
        ConfigError: a key that no model has, or an old name beside its current one.
    """
    aliases = old_names(models)
    known = {name for model in models for name in model.model_fields} | aliases.keys()
    found: dict[str, Any] = {}
    renames: Renames = {}
    for given, value in values.items():
        if given not in known:
            guess = nearest(given, known)
            guess = aliases.get(guess, guess)
            why = f"unknown key; the nearest known one is {guess}"
            raise ConfigError(given, shown(guess, value, models), why)
        name = aliases.get(given, given)
        if name in found:
            other = next((old for old, new in renames.items() if new == name), name)
            why = f"{given} and {other} are names of one key; give {name} alone"
            raise ConfigError(name, shown(name, value, models), why)
        found[name] = value
        if given != name:
            renames[given] = name
    return found, renames


def announce(renames: Renames) -> None:
    """Warn once for each old name, on behalf of the caller's caller."""
    for old, name in renames.items():
        message = f"configuration key {old} is an old name: use {name}"
        warnings.warn(message, RetiredKeyWarning, stacklevel=3)


class ConfigModel(BaseModel):
    """A frozen group of configuration keys, in which every fault is a `ConfigError`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        known, renames = current_names(values, (type(self),))
        announce(renames)
        fields = type(self).model_fields
        for name in known:
            if retired := facts_of(fields[name]).retired:
                message = f"configuration key {name} is retired: {retired}"
                warnings.warn(message, RetiredKeyWarning, stacklevel=2)
        try:
            super().__init__(**known)
        except ValidationError as error:
            raise _config_error(type(self), error) from error

    def require_built(self) -> None:
        """Return if every part of the system that the values ask for exists.

        Raises:
            ConfigError: a key enables a part that is not built; the error names both.
        """
        for name, field in type(self).model_fields.items():
            facts = facts_of(field)
            value = getattr(self, name)
            if facts.part and value not in facts.built:
                raise ConfigError(name, value, f"{facts.part} is not built yet")


def _config_error(model: type[BaseModel], error: ValidationError) -> ConfigError:
    """Give pydantic's first complaint as an error of ours."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    path = name + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]
    )
    value = None if first["type"] == "missing" else first["input"]
    why = first["msg"].removeprefix("Value error, ")
    return ConfigError(path, shown(name, value, (model,)), why)

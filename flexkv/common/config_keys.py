"""What configuration models share: definitions of keys, old names, checks, one kind of error.

The pydantic field definitions are the only table of keys. `key` adds to a field what pydantic does
not know (its unit, its old names, the part of the system that serves it), and everything else
reads it from there: the checks below, the loader of files, and `docs/configuration.md`.

An error never quotes a secret, wherever a broken file has put it. Values of secret keys are masked.
Values of unknown keys, and values that hold other values, are only described. The name of an
unknown key is shown only if it resembles a known one: in a file without colons, secrets are keys.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from pathlib import PurePath
from types import UnionType
from typing import Any, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core.core_schema import ValidationInfo

from flexkv.common import errors
from flexkv.common.errors import ConfigError

MASK = "**********"
"""Shown in place of a secret: the same ten stars that pydantic shows."""

Renames: TypeAlias = dict[str, str]
"""Old name → current name."""


_PLAIN_TEXT = re.compile(r"[\w./:+-]{0,80}")
_TELLING = re.compile("secret|password|passwd|credential|token_|api_?key", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
LIKENESS_MIN, LIKENESS_OF_SECRETS_MIN = 0.6, 0.85
"""How similar an unknown key must be to a known one, or a secret one, for its name to be shown."""

BLOCKS_MAX = 1 << 30
"""Most blocks in a tier, and in one of its files."""
GB_MAX, MB_MAX, SECONDS_MAX = float(1 << 20), float(1 << 20), 31_536_000.0
"""Bounds of sizes and times: a PiB, a TiB, a year. A larger value was given in the wrong unit."""
TEXT_CHARACTERS_MAX = 65_536
_NUMBER_CHARACTERS_MAX = 64


class Described(str):
    """A description that an error shows in place of a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


HIDDEN = Described(errors.HIDDEN)


def as_gb(size_bytes: int) -> str:
    """Return a size as messages show it: in GB as the keys count them, or in MB if it is small."""
    if size_bytes < 1 << 30:
        return f"{size_bytes / (1 << 20):,.2f} MB"
    return f"{size_bytes / (1 << 30):,.2f} GB"


class RetiredKeyWarning(FutureWarning):
    """A configuration uses a name or value that has a newer form."""


class KeyFacts(NamedTuple):
    """What a key's definition says beyond its type, default and description."""

    unit: str = ""
    old: tuple[str, ...] = ()
    """Retired names that mean the same."""
    part: str = ""
    """The part of the system that values outside `built` need, and that is not built yet."""
    built: tuple[object, ...] = ()
    retired: str = ""
    """Why the key itself is retired, and what to use; such a key is accepted with a warning."""
    variables: tuple[str, ...] = ()
    """Environment variables that set the key, beside `FLEXKV_<KEY>`."""
    secret: bool = False
    shown_default: str = ""
    """The default in words, where it follows from other keys."""


_MOST_OF_UNIT = {"blocks": BLOCKS_MAX, "GB": GB_MAX, "MB": MB_MAX, "MB/s": MB_MAX, "s": SECONDS_MAX}
"""The largest value of a key, by its unit."""


def key(default: object, description: str, **options: Any) -> Any:
    """Define one configuration key: a pydantic field with its `KeyFacts` attached.

    Args:
        default: the value when none is given.
        description: what the key does, for the reader of `docs/configuration.md`.
        options: any fields of `KeyFacts`; all others are rules for `pydantic.Field`. A key with a
            unit of size or time has the unit's bounds, and is not negative, unless it says so.
    """
    if (unit := options.get("unit")) in _MOST_OF_UNIT:
        options |= {"le": _MOST_OF_UNIT[unit]} | ({} if "gt" in options else {"ge": 0}) | options
    facts = {name: options.pop(name) for name in KeyFacts._fields if name in options}
    return Field(default, description=description, json_schema_extra=facts, **options)


def facts_of(field: FieldInfo) -> KeyFacts:
    """Return the facts that `key` attached to a field."""
    extra: Any = field.json_schema_extra
    return KeyFacts(**(extra or {}))


def old_names(models: Iterable[type[BaseModel]]) -> Renames:
    """Return the current name for every retired name of these models' keys."""
    return {
        old: name
        for model in models
        for name, field in model.model_fields.items()
        for old in facts_of(field).old
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most similar to `name`."""
    return get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def is_secret(name: str, models: Iterable[type[BaseModel]]) -> bool:
    """Return whether a key's values must not be shown."""
    fields = (model.model_fields.get(name) for model in models)
    return any(field and facts_of(field).secret for field in fields)


def shown(name: str, value: object, models: Iterable[type[BaseModel]]) -> object:
    """Return a key's value as an error may show it: a secret is masked."""
    return MASK if is_secret(name, models) else described(value)


def described(value: object) -> object:
    """Return how to show the value of a key that is not secret: a description, unless it is plain.

    Plain is short and harmless: a forgotten quote puts secrets into the values of other keys.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | PurePath):
        text = str(value)
        if _PLAIN_TEXT.fullmatch(text) and not _TELLING.search(text):
            return value
    return kind_of(value)


def kind_of(value: object) -> Described:
    """Return a description of a value's kind that shows nothing of its content."""
    if isinstance(value, str | PurePath):
        return Described(f"<a text of {len(str(value))} characters>")
    if isinstance(value, Mapping):
        return Described(f"<an object of {len(value)} keys>")
    if isinstance(value, Collection):
        return Described(f"<a list of {len(value)}>")
    return Described(f"<{type(value).__name__}>")


def unknown_key(
    given: str, number: int, known: Collection[str], models: Collection[type[BaseModel]]
) -> ConfigError:
    """Return the error for a key that no model has.

    Args:
        given: the key, which is shown only if it resembles the nearest known one.
        number: which of the given keys it is, counted from 1.
        known: every valid name, including old ones.
        models: the models that have these names.
    """
    aliases = old_names(models)
    guess = nearest(given, known)
    name = aliases.get(guess, guess)
    least = LIKENESS_OF_SECRETS_MIN if is_secret(name, models) else LIKENESS_MIN
    why = f"unknown key; the nearest known one is {name}"
    if re.fullmatch(r"\w+", given) and SequenceMatcher(None, given, guess).ratio() >= least:
        return ConfigError(given, HIDDEN, why)
    what = Described(f"<a name of {len(given)} characters>")
    return ConfigError("key", what, f"number {number} is an {why}")


def current_names(
    values: Mapping[str, Any], models: tuple[type[BaseModel], ...]
) -> tuple[dict[str, Any], Renames]:
    """Return the values under the current names of their keys, and the renames that were made.

    Raises:
        ConfigError: no model has a key, or two names of one key are given.
    """
    aliases = old_names(models)
    known = {name for model in models for name in model.model_fields} | aliases.keys()
    found: dict[str, Any] = {}
    renames: Renames = {}
    for number, (given, value) in enumerate(values.items(), 1):
        if given not in known:
            raise unknown_key(given, number, known, models)
        name = aliases.get(given, given)
        if name in found:
            other = next((old for old, new in renames.items() if new == name), name)
            why = f"{given} and {other} are names of one key; give {name} alone"
            raise ConfigError(name, shown(name, value, models), why)
        found[name] = value
        if given != name:
            renames[given] = name
    return found, renames


def check_no_key_swallowed(values: Mapping[str, Any], models: Collection[type[BaseModel]]) -> None:
    """Check that no value contains a secret key, as happens when a quote is missing.

    Raises:
        ConfigError: a value does; the secret would appear in errors and logs.
    """
    names = {n for model in models for n in model.model_fields if is_secret(n, models)}
    key_in_text = re.compile(rf"({'|'.join(sorted(names))})[\"']?\s*[:=]")
    for name, value in values.items():
        if isinstance(value, str) and name not in names and key_in_text.search(value):
            why = "contains another key: is a quote missing?"
            raise ConfigError(name, kind_of(value), why)


def check_no_rivals(
    values: Mapping[str, Any],
    pairs: Iterable[tuple[str, str]],
    names: Mapping[str, str] | None = None,
) -> None:
    """Check that one source does not give one size in two units.

    Args:
        values: keys that the source gives, and their values; None counts as not given.
        pairs: two keys each, which set the same size.
        names: the source's own names of keys, where they differ.

    Raises:
        ConfigError: both keys of a pair have values.
    """
    for pair in pairs:
        if all(values.get(name) is not None for name in pair):
            one, two = ((names or {}).get(name, name) for name in pair)
            why = f"is the same size as {two}={values[pair[1]]!r}; give one of the two"
            raise ConfigError(one, values[pair[0]], why)


class DuplicateKeyError(Exception):
    """An object has one key twice."""


def without_duplicates(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict of keys and values.

    Raises:
        DuplicateKeyError: a key occurs twice; its argument is the key.
    """
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateKeyError(name)
        found[name] = value
    return found


def announce(renames: Renames) -> None:
    """Warn once about each old name; the warning points at the caller's caller."""
    for old, name in renames.items():
        message = f"configuration key {old} is an old name: use {name}"
        warnings.warn(message, RetiredKeyWarning, stacklevel=3)


class PlainValues(BaseModel):
    """A model that accepts numbers of any library, such as numpy, and no value of a wrong kind."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        value = _plain_scalar(value)
        if type(value) in (list, tuple):
            value = tuple(map(_plain_scalar, value))
        if _is_number(cls.model_fields[info.field_name].annotation):
            if isinstance(value, bool):
                raise ValueError("must be a number, not true or false")
            if isinstance(value, bytes | bytearray) or (
                isinstance(value, str) and len(value) > _NUMBER_CHARACTERS_MAX
            ):
                raise ValueError("must be a number")
        _check_text(value)
        return value


def _plain_scalar(value: Any) -> Any:
    """Return a number or truth value of numpy or torch as Python's own."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if hasattr(value, "__index__") and not isinstance(value, int) and not hasattr(value, "ndim"):
        return value.__index__()
    return value


def _is_number(annotation: Any) -> bool:
    """Return whether a key with this annotation takes a number, possibly None, but no bool."""
    kinds = set(get_args(annotation) if isinstance(annotation, UnionType) else (annotation,))
    return bool(kinds & {int, float}) and bool not in kinds


def _check_text(value: Any) -> None:
    """Check that every text can be written to a file or a socket, and can be a file's name."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(text, str | PurePath):
            continue
        told = str(text)
        if len(told) > TEXT_CHARACTERS_MAX:
            raise ValueError(f"must have at most {TEXT_CHARACTERS_MAX} characters")
        if "\0" in told:
            raise ValueError("must not contain a NUL character")
        fault = None
        try:
            told.encode(errors="surrogateescape")  # names of files need not be UTF-8
        except UnicodeEncodeError as error:
            fault = error.reason
        if fault is not None:  # raised outside of `except`, as its context would hold the text
            raise ValueError(f"cannot be encoded as UTF-8: {fault}")


class ConfigModel(PlainValues):
    """A frozen group of configuration keys; every fault raises a `ConfigError`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    def __init__(self, /, **values: Any) -> None:
        known, renames = current_names(values, (type(self),))
        announce(renames)
        fields = type(self).model_fields
        for name in known:
            if retired := facts_of(fields[name]).retired:
                message = f"configuration key {name} is retired: {retired}"
                warnings.warn(message, RetiredKeyWarning, stacklevel=2)
        fault: ConfigError | None = None
        try:
            super().__init__(**known)
        except ValidationError as error:
            fault = _config_error(type(self), error)
        if fault is not None:  # raised outside of `except`, as its context would hold the values
            raise fault

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Return what `repr` shows: no secret, and no user or password of an address."""
        for name, value in super().__repr_args__():
            yield name, _without_users(value)

    def require_built(self) -> None:
        """Check that every part of the system that the values ask for is built.

        Raises:
            ConfigError: a key enables a part that is not built; the error names both.
        """
        for name, field in type(self).model_fields.items():
            facts = facts_of(field)
            value = getattr(self, name)
            if facts.part and value not in facts.built:
                why = f"{facts.part} is not built yet"
                raise ConfigError(name, shown(name, value, (type(self),)), why)


def _config_error(model: type[BaseModel], error: ValidationError) -> ConfigError:
    """Return pydantic's first error as a ConfigError."""
    first = error.errors(include_url=False)[0]
    name, *rest = first["loc"] or ("configuration",)
    name = str(name)
    if is_secret(name, (model,)):
        rest = []
    elif first["type"] == "extra_forbidden":
        rest[-1:] = [HIDDEN]  # a key that no model has
    path = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    if first["type"] == "missing":
        return ConfigError(path, HIDDEN, "is required: it has no default")
    value = first["input"]
    why = first["msg"].removeprefix("Value error, ")
    return ConfigError(path, shown(name, value, (model,)), why)


def _without_users(value: Any) -> Any:
    """Return addresses with their user names and passwords masked."""
    if isinstance(value, str):
        return _USER_OF_URL.sub(MASK, value)
    return tuple(map(_without_users, value)) if type(value) is tuple else value

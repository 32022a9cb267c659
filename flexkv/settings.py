"""The impure edge of configuration: reads the file and the environment.

`python -m flexkv.settings` prints `docs/configuration.md`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import json5
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flexkv.common.config import CacheConfig, ModelConfig, Settings, settings_of, variable_keys
from flexkv.common.config_keys import HIDDEN, announce, current_names, facts_of, nearest
from flexkv.common.errors import ConfigError

PATH_VARIABLE = "FLEXKV_CONFIG_PATH"


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings of this process: file over environment over defaults.

    Raises:
        ConfigError: the file cannot be read, or a key or value breaks a rule.
    """
    path = environ.get(PATH_VARIABLE)
    return settings_of(load_file(Path(path)) if path else {}, _from_environment(environ))


def load_file(path: Path, field: str = PATH_VARIABLE) -> dict[str, Any]:
    """Return the content of a file: YAML by its suffix, else JSON with comments.

    Args:
        path: of the file.
        field: the file's name in errors.

    Raises:
        ConfigError: it is missing, cannot be read, or is not an object; a syntax error has
            its place.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(field, str(path), error.strerror or "unreadable") from error
    return load_object(content, field, str(path), path.suffix in (".yaml", ".yml"))


def load_object(
    content: bytes, field: str, told: str = "", is_yaml: bool = False
) -> dict[str, Any]:
    """Return the object that a YAML or JSON text holds; an empty YAML text is an empty object.

    Neither the error nor its context has any of the text, which may hold secrets.

    Args:
        content: UTF-8.
        field: the text's name in errors.
        told: replaces the text in errors.
        is_yaml: else JSON with comments.

    Raises:
        ConfigError: it is not an object; a syntax error has its place.
    """
    why = ""
    try:
        text = content.decode()
        found = yaml.safe_load(text) if is_yaml else json5.loads(text)
    except _FAULTS as error:
        why = f"syntax: {_fault(error)}"
    del content  # tools that show the variables of a traceback would show it
    if not why:
        if found is None and is_yaml:
            return {}
        if isinstance(found, dict):
            return found
        why = "must hold an object of keys"
    text = found = ""
    raise ConfigError(field, told, why)


_FAULTS = (
    yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
"""YAML's parser lets errors of its constructors through: `!!bool x` is a KeyError."""


def _fault(error: BaseException) -> str:
    """Return what is wrong with a text, and where, without quoting the text."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # The parser's own words end where the first quotation, or another error's text, begins.
        words = re.split("['\":]", error.problem or "", maxsplit=1)[0]
        words = re.sub(", but (found|got) *$|, *$", "", words).strip()
        return (words or "is not YAML") + place
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if isinstance(error, RecursionError):
        return "nests too deeply"
    if (
        found := re.search(r":(\d+) Unexpected .* at column (\d+)$", str(error), re.DOTALL)
    ) is not None:
        words = (
            "ends too soon"
            if "Unexpected end of input" in str(error)[:60]
            else "unexpected character"
        )
        return f"{words} at line {found[1]}, column {found[2]}"
    return "a value is not what its tag or form says"


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys that environment variables set, by their current names."""
    known = variable_keys()
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        if variable in known:
            found[known[variable]] = value
        elif variable.startswith("FLEXKV_") and variable != PATH_VARIABLE:
            guess = nearest(variable, known)
            raise ConfigError(variable, HIDDEN, f"unknown variable; the nearest known is {guess}")
    values, renames = current_names(found, (Settings, CacheConfig))
    announce(renames)
    return values


def document() -> str:
    """Give `docs/configuration.md`, made from the keys' own definitions."""
    lines = [
        "# Configuration",
        "",
        "Made by `python -m flexkv.settings` from the definitions of the keys; do not edit.",
        "",
        "A key is given in code (`CacheConfig(...)`), in the file that `FLEXKV_CONFIG_PATH` names",
        "(JSON with comments, or YAML; flat, or with the cache's keys under `cache_config`), or as",
        "`FLEXKV_<KEY>` in the environment. The file wins over the environment. Older names are",
        "accepted with a warning.",
    ]
    for title, model in (
        ("ModelConfig", ModelConfig),
        ("CacheConfig", CacheConfig),
        ("Settings of a process", Settings),
    ):
        lines += ["", f"## {title}", "", "| key | default | meaning | older names |"]
        lines += ["|---|---|---|---|", *_rows(model)]
    return "\n".join([*lines, ""])


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        facts = facts_of(field)
        default = facts.shown_default or field.get_default(call_default_factory=True)
        if field.default is PydanticUndefined and field.default_factory is None:
            default = "required"
        elif name == "cache_config":
            default = "as above"
        elif default in (None, "", ()):
            default = "none"
        meaning = field.description or ""
        if facts.unit:
            meaning += f" ({facts.unit})"
        if facts.part:
            meaning += f" Not built yet: {facts.part.rstrip(',')}."
        if facts.retired:
            meaning += f" Retired: {facts.retired}."
        told = str(default).lower() if isinstance(default, bool) else str(default)
        old = ", ".join(f"`{name}`" for name in facts.old)
        yield f"| `{name}` | {told} | {meaning} | {old} |".replace(" |  |", " | |")


if __name__ == "__main__":
    import sys

    sys.stdout.write(document())

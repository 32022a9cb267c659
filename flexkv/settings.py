"""Where the configuration comes in from outside: a file, and the environment.

    file  >  environment  >  default

Each source is brought to the keys' current names first, so that an old name in one and the current
name in the other are one key. `python -m flexkv.settings` prints the page that documents the keys.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import json5
import yaml

from flexkv.common.config import CacheConfig, Settings
from flexkv.common.config_cache import SIZE_PAIRS
from flexkv.common.config_keys import (
    Renames,
    announce,
    current_names,
    facts_of,
    nearest,
    old_names,
    shown,
)
from flexkv.common.config_page import configuration_page
from flexkv.common.errors import ConfigError

PATH_VARIABLE = "FLEXKV_CONFIG_PATH"
PREFIX = "FLEXKV_"
NOT_SETTINGS = frozenset({PATH_VARIABLE, "FLEXKV_SANITIZE"})
"""Variables that share the prefix but set no key: `FLEXKV_SANITIZE` is the build's."""

MODELS = (Settings, CacheConfig)
NESTED = "cache_config"


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Give the settings of the file that `FLEXKV_CONFIG_PATH` names, and of the environment.

    Raises:
        ConfigError: the file cannot be read or parsed, or a key or value breaks a rule.
    """
    values, renames = _from_environment(environ)
    if path := environ.get(PATH_VARIABLE):
        from_file, file_renames = _from_file(Path(path))
        values = _outranked(values, from_file) | from_file
        renames |= file_renames
    announce(renames)
    return _settings(values)


def load_file(path: str | os.PathLike[str]) -> Settings:
    """Give the settings of one file, whatever the environment says.

    Raises:
        ConfigError: the file cannot be read or parsed, or a key or value breaks a rule.
    """
    values, renames = _from_file(Path(path))
    announce(renames)
    return _settings(values)


def _settings(values: Mapping[str, Any]) -> Settings:
    own = {name: value for name, value in values.items() if name in Settings.model_fields}
    cache = {name: value for name, value in values.items() if name in CacheConfig.model_fields}
    return Settings(**own, cache_config=CacheConfig(**cache))


def _outranked(environment: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """Give what is left of the environment when the file gives a size in its other form."""
    settled = {name for pair in SIZE_PAIRS if file.keys() & set(pair) for name in pair}
    return {name: value for name, value in environment.items() if name not in settled}


def _variables() -> dict[str, str]:
    """Give every environment variable that sets a key, with the name of the key it sets."""
    names: dict[str, str] = {}
    for model in MODELS:
        for name, field in model.model_fields.items():
            if name != NESTED:
                names[PREFIX + name.upper()] = name
                names |= dict.fromkeys(facts_of(field).variables, name)
    return names | {PREFIX + old.upper(): old for old in old_names(MODELS)}


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], Renames]:
    variables = _variables()
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        name = variables.get(variable)
        if name is None:
            if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
                guess = nearest(variable, variables)
                why = f"unknown variable; the nearest known one is {guess}"
                raise ConfigError(variable, shown(variables[guess], value, MODELS), why)
        elif value.strip():
            _add(found, name, value, "two environment variables give it different values")
    return current_names(found, MODELS)


def _from_file(path: Path) -> tuple[dict[str, Any], Renames]:
    document = _mapping(_parsed(path), PATH_VARIABLE, path)
    nested = _mapping(document.pop(NESTED, None), NESTED, path)
    outer, renames = current_names(document, MODELS)
    inner, inner_renames = current_names(nested, MODELS)
    for name, value in inner.items():
        _add(outer, name, value, f"the top level and {NESTED} give it different values")
    return outer, renames | inner_renames


def _add(found: dict[str, Any], name: str, value: Any, why: str) -> None:
    """Add a value, which may be there already as long as it is the same."""
    if found.setdefault(name, value) != value:
        raise ConfigError(name, shown(name, value, MODELS), why)


def _mapping(value: object, field: str, path: Path) -> dict[str, Any]:
    """Give a file's section as a mapping from names; an absent one is empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(field, str(path), "must map keys to values")
    for name in value:
        if not isinstance(name, str):
            raise ConfigError(str(name), str(path), "a key must be a name")
    return dict(value)


def _parsed(path: Path) -> object:
    """Give the content of a YAML file, or of a JSON file with comments, as its suffix says."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(PATH_VARIABLE, str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(PATH_VARIABLE, str(path), "is not UTF-8 text") from error
    try:
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        return json5.loads(text, allow_duplicate_keys=False)
    except yaml.YAMLError as error:
        raise ConfigError(PATH_VARIABLE, str(path), _yaml_fault(error)) from error
    except ValueError as error:
        why = re.sub(r"^<string>:(\d+) ", r"line \1: ", str(error))
        raise ConfigError(PATH_VARIABLE, str(path), why) from error


def _yaml_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "is not YAML"
    return f"line {mark.line + 1}: {problem}" if mark else problem


if __name__ == "__main__":
    sys.stdout.write(configuration_page())

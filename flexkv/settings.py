"""The impure edge of configuration: reads the file and the environment.

`python -m flexkv.settings` prints `docs/configuration.md`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import json5
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flexkv.common.config import CacheConfig, ModelConfig, Settings, settings_of, variable_keys
from flexkv.common.config_keys import announce, current_names, facts_of, nearest, shown
from flexkv.common.errors import ConfigError

PATH_VARIABLE = "FLEXKV_CONFIG_PATH"


def load_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Give the settings of this process: file over environment over defaults.

    Raises:
        ConfigError: the file cannot be read, or a key or value breaks a rule.
    """
    path = environ.get(PATH_VARIABLE)
    return settings_of(load_file(Path(path)) if path else {}, _from_environment(environ))


def load_file(path: Path) -> dict[str, Any]:
    """Give the content of a configuration file: YAML by its suffix, else JSON with comments.

    Raises:
        ConfigError: missing, not to be read, or not an object; with the place of a syntax error.
    """
    try:
        text = path.read_text()
        is_yaml = path.suffix in (".yaml", ".yml")
        content = yaml.safe_load(text) if is_yaml else json5.loads(text)
    except OSError as error:
        raise ConfigError(PATH_VARIABLE, str(path), error.strerror or "unreadable") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(PATH_VARIABLE, str(path), f"syntax: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(PATH_VARIABLE, str(path), "must hold an object of keys")
    return content


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Give the keys that environment variables set, by their current names."""
    known = variable_keys()
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        if variable in known:
            found[known[variable]] = value
        elif variable.startswith("FLEXKV_") and variable != PATH_VARIABLE:
            guess = nearest(variable, known)
            told = shown(known[guess], value, (Settings, CacheConfig))
            raise ConfigError(variable, told, f"unknown variable; the nearest known is {guess}")
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

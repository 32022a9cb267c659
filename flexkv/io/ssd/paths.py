"""Expands paths of the configuration, and makes paths printable in messages."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flexkv.common.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|(\w+))")


def expanded(path: Path, field: str = "ssd_cache_dir") -> Path:
    """Return the absolute path, with `~`, `~user`, `$NAME` and `${NAME}` replaced.

    Raises:
        ConfigError: there is no such user, or a variable is not set or is empty.
    """

    def value_of(found: re.Match[str]) -> str:
        name = found[1] if found[1] is not None else found[2]
        if value := os.environ.get(name):
            return value
        raise ConfigError(field, shown(path), f"the environment variable {name} is not set")

    found = Path(_VARIABLE.sub(value_of, str(path)))
    try:
        return found.expanduser().absolute()
    except RuntimeError:
        why = f"the home directory of {found.parts[0]} is unknown"
        raise ConfigError(field, shown(path), why) from None
    except OSError as error:  # the working directory was removed
        why = f"the working directory cannot be found ({error.strerror})"
        raise ConfigError(field, shown(path), why) from error


def shown(path: Path) -> str:
    """Return a path as text that can be printed, whatever bytes its name has."""
    return str(path).encode("utf-8", "backslashreplace").decode()

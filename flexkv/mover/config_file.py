"""Configuration files of Mooncake: reading them, and errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import json5

from flexkv.common.errors import HIDDEN, ConfigError


def read_config(key: str, path: str | None, what: str) -> dict[str, Any]:
    """Return the object in a configuration file.

    Args:
        key: the key that names the file.
        path: the file.
        what: what the file configures, in words.

    Raises:
        ConfigError: there is no file, or it cannot be read.
    """
    if not path:
        raise ConfigError(key, path, f"set it to the configuration file of {what}")
    try:
        found = json5.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(key, path, f"cannot be read: {why}") from None
    if not isinstance(found, dict):
        raise ConfigError(key, path, "must be a JSON object")
    return found


class Hidden:
    """Stands in an error for a value that it does not show."""

    def __repr__(self) -> str:
        return HIDDEN

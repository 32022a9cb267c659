"""Reads lines of files that may be anything: an endless device, a file without line breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexkv.common.errors import ConfigError

LINE_BYTES_MAX = 64 << 20


def lines_of(path: Path, field: str) -> Iterator[bytes]:
    """Return the lines of a file.

    Raises:
        ConfigError: it cannot be read, or has a line that is longer than any of ours; `field`
            names it.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                if len(line) == LINE_BYTES_MAX:
                    raise ConfigError(field, str(path), "is not text: it has an endless line")
                yield line
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(field, str(path), f"cannot be read: {why}") from error

"""Lines of files that may be anything, such as an endless device or a file without lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexkv.common.errors import ConfigError

LINE_BYTES_MAX = 64 << 20


def lines_of(path: Path, field: str) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        ConfigError: the file cannot be read, or a line has `LINE_BYTES_MAX` bytes or more; the
            error is about `field`.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                if len(line) == LINE_BYTES_MAX:
                    raise ConfigError(field, str(path), "is not text: it has a line without an end")
                yield line
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(field, str(path), f"cannot be read: {why}") from error

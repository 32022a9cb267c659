"""Directories as people write them in a configuration: text, lists, paths, `file:` addresses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote_to_bytes

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_OTHER_SEPARATOR = re.compile(r"[,:]\s*~?/")
_HOSTS_OF_OURS = ("", "localhost")


def directories_of(value: object) -> tuple[Path, ...]:
    """Return the directories that a value names, in its order. Nothing is expanded yet.

    Args:
        value: a path, as str, bytes or `os.PathLike`; a str with several separated by `;`, or with
            a JSON list of them; a list of paths; or None.

    Raises:
        ValueError: the value, or an item of it, names no directory; it says which rule is broken.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            return _each(_json_list(value))
        return _each([part.strip() for part in value.split(";") if part.strip()])
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return _each(list(value))
    return _each([value])


def _json_list(text: str) -> list[object]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise ValueError("begins with `[`, but is not a JSON list")  # noqa: TRY004 -- pydantic's
    return found


def _each(values: list[object]) -> tuple[Path, ...]:
    found = []
    for number, value in enumerate(values, 1):
        try:
            found.append(_directory(value))
        except ValueError as error:
            which = f"directory {number} of {len(values)} " if len(values) > 1 else ""
            raise ValueError(f"{which}{error}") from None
    return tuple(found)


def _directory(value: object) -> Path:
    """Return the directory that one value names."""
    is_text = isinstance(value, str)
    to_path = getattr(type(value), "__fspath__", None)
    if to_path is not None:
        value = to_path(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")  # as Python decodes names of files
    if not isinstance(value, str):
        raise ValueError("must be text or a path")  # noqa: TRY004 -- pydantic takes no other
    if not value.strip():
        raise ValueError("must not be empty")
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    if (scheme := _SCHEME.match(value)) is not None:
        return _of_address(value, scheme[1].lower())
    if is_text and _OTHER_SEPARATOR.search(value):
        raise ValueError("must be one path: separate several by `;`, or give a list")
    return Path(value)


def _of_address(value: str, scheme: str) -> Path:
    """Return the directory that a `file:` address names."""
    if scheme != "file":
        raise ValueError(f"must be a directory of this machine, not a `{scheme}:` address")
    rest = value[len("file:") :]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in _HOSTS_OF_OURS:
            raise ValueError("must not name a host: write `file:///dir`")
        rest = slash + path
    if "?" in rest or "#" in rest:
        raise ValueError("must not contain `?` or `#`, because it is a `file:` address")
    path = unquote_to_bytes(rest).decode("utf-8", "surrogateescape")
    if not path or "\0" in path:
        raise ValueError("must name a directory")
    return Path(path)

"""Types of configuration values that may be given in several forms."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Secret

from flexkv.common.config_keys import DuplicateKeyError, RetiredKeyWarning, without_duplicates
from flexkv.common.directories import directories_of


def _joined(value: object) -> object:
    """Return addresses as a tuple; a string may hold several, joined by `;`."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    if not isinstance(value, list | tuple):
        raise ValueError("must be a URL as text")  # noqa: TRY004 -- pydantic takes no other
    return value


def _block_first(value: object) -> object:
    """Return the current name of a layout, and warn about an old name: only one layout exists."""
    name = value.upper() if isinstance(value, str) else value
    notes = {
        "BLOCKWISE": "BLOCKWISE is an old name: use BLOCKFIRST",
        "LAYERWISE": "LAYERWISE is ignored: every block is one contiguous extent (BLOCKFIRST)",
    }
    if isinstance(name, str) and name in notes:
        warnings.warn(f"configured layout {notes[name]}", RetiredKeyWarning, stacklevel=4)
        return "BLOCKFIRST"
    return name


def _object(value: object) -> object:
    """Return the object that a JSON text, as from an environment variable, describes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError, DuplicateKeyError):
        fault = ValueError("must be a JSON object")
    raise fault  # raised outside of `except`, because its context would hold the text


Paths = Annotated[tuple[Path, ...], BeforeValidator(directories_of)]
Addresses = Annotated[tuple[str, ...], BeforeValidator(_joined)]
Layout = Annotated[Literal["BLOCKFIRST"], BeforeValidator(_block_first)]
CustomConfig = Annotated[Secret[dict[str, Any]], BeforeValidator(_object)]
EvictionPolicy = Literal["lru", "lfu", "fifo", "mru", "filo", "slru", "lhd"]

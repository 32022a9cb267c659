"""Managers that nobody has closed: they are ended when they are collected, or at exit."""

from __future__ import annotations

import atexit
import sys
import warnings
import weakref
from contextlib import suppress
from typing import Protocol

from flexkv.common.errors import FlexKVError
from flexkv.logs import get_logger

log = get_logger(__name__)

END_S = 10.0
"""How long the end of a forgotten manager may take; its flush is bounded besides."""


class Unclosed(Protocol):
    """A manager that is open, or was."""

    @property
    def is_unclosed(self) -> bool:
        """Whether this process has to close it."""
        ...

    def end(self, timeout_s: float | None = None) -> None:
        """Close it, from any thread."""
        ...


_open: weakref.WeakSet[Unclosed] = weakref.WeakSet()


def remember(manager: Unclosed) -> None:
    """End a manager at exit, unless it is forgotten before."""
    _open.add(manager)


def forget(manager: Unclosed) -> None:
    """End a manager at exit no more: it is being closed."""
    _open.discard(manager)


def end_forgotten(manager: Unclosed) -> None:
    """Warn that a manager was not closed, and end it: its directory is free then.

    Never raises, nor waits for longer than `END_S`. What the interpreter drops once it has
    finished its own exit, and what a forked child drops, is left as it is.
    """
    if sys.is_finalizing() or not manager.is_unclosed:
        return
    what = f"{type(manager).__name__} was not closed: call shutdown(), or use `async with`"
    with suppress(Warning):  # where warnings are errors: the rest has to be done
        warnings.warn(what, ResourceWarning, stacklevel=3, source=manager)
    try:
        manager.end(END_S)
    except (FlexKVError, OSError, RuntimeError) as error:
        log.warning("not_closed", reason=str(error))


def _at_exit() -> None:
    for manager in list(_open):
        end_forgotten(manager)


atexit.register(_at_exit)

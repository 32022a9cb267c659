"""Ends managers that nobody has closed, when they are garbage-collected or at exit."""

from __future__ import annotations

import sys
import warnings
import weakref
from contextlib import suppress
from typing import Protocol

from flexkv.common.errors import FlexKVError
from flexkv.observe.logs import get_logger
from flexkv.process.foreign_calls import before_calls_end

log = get_logger(__name__)

END_S = 10.0
"""How long ending a forgotten manager may take; its flush has a bound of its own, too."""


class Unclosed(Protocol):
    """A manager that is open, or was."""

    name: str

    @property
    def is_unclosed(self) -> bool:
        """Return whether this process has to close it."""
        ...

    def end(self, timeout_s: float | None = None) -> None:
        """Close it, from any thread."""
        ...


_open: weakref.WeakSet[Unclosed] = weakref.WeakSet()


def remember(manager: Unclosed) -> None:
    """Register a manager, which is ended at exit unless `forget` is called before."""
    _open.add(manager)


def forget(manager: Unclosed) -> None:
    """Unregister a manager, because it is being closed."""
    _open.discard(manager)


def end_forgotten(manager: Unclosed) -> None:
    """Warn that a manager was not closed, and end it, which frees its directory.

    Never raises, and never waits for longer than `END_S`. A manager is left as it is in a
    forked child, and when the interpreter is finalizing.
    """
    if sys.is_finalizing() or not manager.is_unclosed:
        return
    what = f"{manager.name} was not closed: call shutdown(), or use `async with`"
    with suppress(Warning):  # the rest has to be done even where warnings are errors
        warnings.warn(what, ResourceWarning, stacklevel=3, source=manager)
    try:
        manager.end(END_S)
    except (FlexKVError, OSError, RuntimeError) as error:
        log.warning("manager_not_closed", reason=str(error))


def _at_exit() -> None:
    for manager in list(_open):
        end_forgotten(manager)


before_calls_end(_at_exit)

"""Logging set-up: structlog events as console lines on a terminal, as JSON lines otherwise.

A library does not configure logging by itself: programs call `configure_logging`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

import structlog

from flexkv.common.errors import ConfigError

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


REPEATS_MAX, REPEATS_S = 10, 10.0
"""Lines of one event about one thing that pass in so many seconds."""
SEEN_MAX = 1024


def configure_logging(
    level: str | None = None, prefix: str | None = None, as_json: bool | None = None
) -> None:
    """Send events to stderr from here on.

    Args:
        level: least severity; FLEXKV_LOG_LEVEL when None, "info" when that is unset.
        prefix: stands on every line as `prefix`; FLEXKV_LOGGING_PREFIX when None.
        as_json: JSON lines; when None, exactly when stderr is not a terminal.

    Raises:
        ConfigError: an unknown level.
    """
    chosen = (level or os.environ.get("FLEXKV_LOG_LEVEL") or "info").lower()
    if chosen not in LEVELS:
        raise ConfigError("FLEXKV_LOG_LEVEL", chosen, f"must be one of {', '.join(LEVELS)}")
    label = prefix if prefix is not None else os.environ.get("FLEXKV_LOGGING_PREFIX", "")
    to_json = not sys.stderr.isatty() if as_json is None else as_json

    def add_prefix(
        _logger: object, _name: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if label:
            event["prefix"] = label
        return event

    renderer = structlog.processors.JSONRenderer() if to_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _Repeats(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            add_prefix,
            structlog.processors.format_exc_info if to_json else _as_it_is,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, chosen.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


_ABOUT = ("event", "tier", "route", "actor", "path", "task", "reason", "call", "code")


class _Repeats:
    """Drops lines that say the same too often; the next one that passes tells how many."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._seen: dict[tuple[object, ...], tuple[float, int, int]] = {}

    def __call__(
        self, _logger: object, name: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        about = tuple(event.get(key) for key in _ABOUT)
        now_s, key = self._now_s(), (name, *map(str, about))
        if name in ("error", "critical", "exception"):
            return event
        since_s, passed, dropped = self._seen.get(key, (now_s, 0, 0))
        if now_s - since_s >= REPEATS_S:
            since_s, passed = now_s, 0
        if passed >= REPEATS_MAX:
            self._seen[key] = since_s, passed, dropped + 1
            raise structlog.DropEvent
        if dropped:
            event["repeats_dropped"] = dropped
        if len(self._seen) >= SEEN_MAX and key not in self._seen:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = since_s, passed + 1, 0
        return event


def _as_it_is(
    _logger: object, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Leave exceptions to the console renderer, which draws them better."""
    return event

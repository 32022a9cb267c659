"""Logging set-up: structlog events as console lines on a terminal, as JSON lines otherwise.

A library does not configure logging by itself: programs call `configure_logging`.
"""

from __future__ import annotations

import logging
import os
import sys

import structlog

from flexkv.common.errors import ConfigError

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


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


def _as_it_is(
    _logger: object, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Leave exceptions to the console renderer, which draws them better."""
    return event

"""Logging: Python's `logging` when used as a library, events on stderr in our own commands.

    library   logger "flexkv.…" of `logging`; the caller's handlers, levels and filters decide
    command   `configure_logging`: to stderr, console lines on a terminal, else JSON lines

The library adds no handler and writes to no stream. The level and the prefix of the environment and
the settings apply to both. A caller that has configured structlog gets the events there.

A line that cannot be written is dropped, and nothing else happens: modules log by `get_logger`,
whose loggers ignore what a handler or a sink raises, and our own sink never waits for a reader.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TextIO

import structlog

from flexkv.common.errors import ConfigError

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
LEVEL_VARIABLE, PREFIX_VARIABLE = "FLEXKV_LOG_LEVEL", "FLEXKV_LOGGING_PREFIX"
ROOT = "flexkv"
"""Name of the logger in `logging` that is the parent of all of ours."""

REPEATS_MAX, REPEATS_S = 10, 10.0
"""At most this many lines of one event about one thing pass, in this many seconds."""
SEEN_MAX = 1024
PIECE_BYTES = select.PIPE_BUF
"""How many bytes a writable pipe accepts without blocking."""

_SINK_FAULTS = (OSError, ValueError, RuntimeError, TypeError, AttributeError)
"""What writing may raise, in this order: closed pipe or full disk; closed file or wrong encoding;
a signal handler that logs during a write; no stream, or something else in its place (two)."""


class _Given(NamedTuple):
    """Least level and prefix of a library's lines, from the environment or the settings."""

    least: int = 0
    prefix: str = ""


_given = _Given()


class Logger:
    """A logger that never raises; each line's destination is decided when it is logged."""

    __slots__ = ("_inner", "_name")

    def __init__(self, name: str) -> None:
        self._inner: Any = structlog.get_logger(name)
        self._name = name

    def debug(self, event: str, **facts: Any) -> None:
        """Log a detail that helps to find errors."""
        self._log("debug", event, facts)

    def info(self, event: str, **facts: Any) -> None:
        """Log a normal event."""
        self._log("info", event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Log a condition that is wrong but harmless."""
        self._log("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """Log an error."""
        self._log("error", event, facts)

    def exception(self, event: str, **facts: Any) -> None:
        """Log an error, with the traceback of the exception that is being handled.

        The traceback is formatted here, because some renderers also show the variables of each
        frame, and with them secrets and prompts.
        """
        self._log("error", event, {**facts, "exception": traceback.format_exc().rstrip()})

    def _log(self, level: str, event: str, facts: dict[str, Any]) -> None:
        # Handlers, filters and processors that are not ours may raise anything.
        with suppress(Exception, structlog.DropEvent):
            if structlog.is_configured():
                if LEVELS[level] >= _given.least:
                    getattr(self._inner, level)(event, **facts)
                return
            logger = logging.getLogger(self._name)
            if logger.isEnabledFor(LEVELS[level]):
                told = _repeats(None, level, {"event": event, **facts})
                # Three frames: this method, the level's method, the caller.
                logger.log(LEVELS[level], _as_line(told), extra={"facts": told}, stacklevel=3)


def get_logger(name: str) -> Logger:
    """Return the logger of a module."""
    return Logger(name)


def obey(level: str | None, prefix: str | None, field: str = "log_level") -> None:
    """Set the level and the prefix of a library's lines; None leaves a value as it is.

    Handlers remain the caller's business; they get the lines from this level up.

    Raises:
        ConfigError: the level is unknown; `field` names its key.
    """
    global _given
    if level is not None:
        _given = _given._replace(least=_number_of(level, field))
        logging.getLogger(ROOT).setLevel(_given.least)
    if prefix is not None:
        _given = _given._replace(prefix=prefix)


def obey_environment() -> None:
    """Set the level and the prefix of a library's lines from the environment, where it has them.

    Raises:
        ConfigError: the level is unknown.
    """
    level, prefix = os.environ.get(LEVEL_VARIABLE), os.environ.get(PREFIX_VARIABLE)
    obey(level or None, prefix, LEVEL_VARIABLE)


def forget_configuration() -> None:
    """Reset all configuration of logging, for tests."""
    global _given
    _given = _Given()
    logging.getLogger(ROOT).setLevel(logging.NOTSET)
    structlog.reset_defaults()


def _number_of(level: str, field: str) -> int:
    if level.lower() not in LEVELS:
        raise ConfigError(field, level, f"must be one of {', '.join(LEVELS)}")
    return LEVELS[level.lower()]


def _as_line(told: Mapping[str, Any]) -> str:
    """Return an event and its facts as one line, with a traceback on lines of its own."""
    facts = {name: value for name, value in told.items() if name not in ("event", "exception")}
    words = [f"[{_given.prefix}]"] if _given.prefix else []
    words += [str(told["event"]), *(f"{name}={_as_word(fact)}" for name, fact in facts.items())]
    trace = told.get("exception")
    return " ".join(words) + (f"\n{trace}" if trace else "")


def _as_word(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)


def configure_logging(
    level: str | None = None, prefix: str | None = None, as_json: bool | None = None
) -> None:
    """Send events to stderr from now on; a line that cannot be written at once is dropped.

    Args:
        level: least severity; FLEXKV_LOG_LEVEL when None, "info" when that is unset.
        prefix: every line has it as its fact `prefix`; FLEXKV_LOGGING_PREFIX when None.
        as_json: whether to write JSON lines; when None, exactly when stderr is not a terminal.

    Raises:
        ConfigError: the level is unknown.
    """
    chosen = level or os.environ.get(LEVEL_VARIABLE) or "info"
    least = _number_of(chosen, "log_level" if level else LEVEL_VARIABLE)
    label = prefix if prefix is not None else os.environ.get(PREFIX_VARIABLE, "")
    sink = _Sink(sys.stderr)
    to_json = not sink.is_terminal if as_json is None else as_json

    def add_facts(
        _logger: object, _name: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        if label:
            event["prefix"] = label
        if sink.lines_dropped:
            event["lines_dropped"] = sink.lines_dropped
        return event

    renderer = (
        structlog.processors.JSONRenderer()
        if to_json
        # The default formatter shows the variables of each frame, and with them secrets.
        else structlog.dev.ConsoleRenderer(
            colors=sink.is_terminal and _likes_colors(),
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _Repeats(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            add_facts,
            # The console renderer formats exceptions better.
            *([structlog.processors.format_exc_info] if to_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )


def _likes_colors() -> bool:
    """Return whether colours may be sent to a terminal: see https://no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Sink:
    """Writes lines to a stream, bypassing its buffer; a line that fails is not tried again.

    Attributes:
        is_terminal: whether the stream is a terminal.
        lines_dropped: lines dropped since the last one that was written whole.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._fd = stream, -1
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self.is_terminal, self.lines_dropped, self._torn = False, 0, False
        if stream is not None:
            with suppress(*_SINK_FAULTS):  # the stream may have no descriptor, or be closed
                self.is_terminal = stream.isatty()
                self._fd = stream.fileno()
                stream.flush()

    def msg(self, line: str) -> None:
        """Write a line, or drop it."""
        try:
            self._write(line)
        except _SINK_FAULTS:
            self.lines_dropped += 1
        else:
            self.lines_dropped = 0

    debug = info = warning = warn = error = critical = fatal = exception = log = failure = msg

    def _write(self, line: str) -> None:
        """Write a line.

        Raises:
            OSError: the stream does not accept it, or not at once.
            ValueError: the stream is closed.
        """
        if self._fd < 0:
            if self._stream is not None:
                print(line, file=self._stream, flush=True)
            return
        content = memoryview(f"{line}\n".encode(self._encoding, "backslashreplace"))
        waits = not stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._torn:
            content = memoryview(b"\n" + bytes(content))
        begun = False
        try:
            while content:
                if waits and not self._is_ready():
                    raise BlockingIOError
                content = content[os.write(self._fd, content[:PIECE_BYTES] if waits else content) :]
                begun = True
        finally:
            self._torn = bool(content) and (begun or self._torn)

    def _is_ready(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))


_ABOUT = ("event", "tier", "route", "actor", "path", "task", "reason", "call", "code")


class _Repeats:
    """Drops lines that repeat too often; the next line that passes has the number dropped."""

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


_repeats = _Repeats()
"""The filter of a library's lines."""

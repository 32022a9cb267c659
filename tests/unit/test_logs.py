"""Logging: JSON or console, levels and a prefix; an import configures nothing."""

from __future__ import annotations

import json

import pytest
import structlog

from flexkv.common.errors import ConfigError
from flexkv.observe.logs import REPEATS_MAX, REPEATS_S, _Repeats, configure_logging


def test_json_lines_have_level_time_and_prefix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JSON line is one object with level, time, exception text and the environment's prefix."""
    monkeypatch.setenv("FLEXKV_LOGGING_PREFIX", "rank0")
    configure_logging("info", as_json=True)
    log = structlog.get_logger("test")
    log.debug("not shown")
    try:
        [].pop()
    except IndexError:
        log.exception("went wrong", blocks=3)
    (line,) = capsys.readouterr().err.strip().splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["blocks"]) == ("went wrong", "error", 3)
    assert event["prefix"] == "rank0"
    assert "pop from empty list" in event["exception"]
    assert "timestamp" in event


def test_a_console_gets_readable_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Console lines are plain text, not JSON."""
    configure_logging("info", prefix="", as_json=False)
    structlog.get_logger("test").info("hello", blocks=3)
    told = capsys.readouterr().err
    assert "hello" in told
    assert not told.startswith("{")


def test_an_unknown_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown level is a ConfigError that names the variable."""
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="FLEXKV_LOG_LEVEL"):
        configure_logging()


def test_a_line_that_is_repeated_too_often_is_dropped_and_counted() -> None:
    """A line repeated too often is dropped and counted for a while; other lines pass."""
    now = [0.0]
    repeats = _Repeats(lambda: now[0])

    def passes(**event: object) -> bool:
        try:
            repeats(None, "warning", {"event": "op_failed", **event})
        except structlog.DropEvent:
            return False
        return True

    assert sum(passes(route="host→disk") for _ in range(50)) == REPEATS_MAX
    assert passes(route="disk→host")
    now[0] = REPEATS_S
    told = repeats(None, "warning", {"event": "op_failed", "route": "host→disk"})
    assert told["repeats_dropped"] == 50 - REPEATS_MAX
    told = repeats(None, "warning", {"event": "op_failed", "route": "host→disk"})
    assert "repeats_dropped" not in told

"""Logging: JSON or console, levels, a prefix; nothing configured by import."""

from __future__ import annotations

import json

import pytest
import structlog

from flexkv.common.errors import ConfigError
from flexkv.logs import configure_logging


def test_json_lines_have_level_time_and_prefix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One object a line, exceptions as text, the prefix from the environment."""
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
    """Not JSON."""
    configure_logging("info", prefix="", as_json=False)
    structlog.get_logger("test").info("hello", blocks=3)
    told = capsys.readouterr().err
    assert "hello" in told
    assert not told.startswith("{")


def test_an_unknown_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """ConfigError with the variable."""
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="FLEXKV_LOG_LEVEL"):
        configure_logging()

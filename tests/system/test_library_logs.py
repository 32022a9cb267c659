"""Tests of log lines in a program of others: they go where its `logging` says, nowhere else."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.errors import ConfigError
from flexkv.observe.logs import configure_logging, get_logger, obey
from flexkv.settings import load_settings

from .conftest import PER_BLOCK, MakeManager, kv_caches, slots_of

ROOT = Path(__file__).parents[2]
USE = """
import logging, sys
import numpy as np
{before}
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager
model = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="int8")
cache = CacheConfig(num_cpu_blocks=4, num_ssd_blocks=4, ssd_cache_dir=sys.argv[1])
manager = KVManager(model, cache)
manager.start()
manager.register_kv_caches([np.zeros((2, 4, 16, 1, 8), np.int8)])
manager.wait(manager.put_async(np.arange(16), np.arange(16)), completely=True)
manager.shutdown()
loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
ours = [logger for logger in loggers if logger.name.startswith("flexkv")]
assert not any(logger.handlers or not logger.propagate for logger in ours), ours
{after}
"""


def use(folder: Path, before: str = "", after: str = "", **environment: str) -> tuple[str, str]:
    """Use a manager in a program, and return its stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", USE.format(before=before, after=after), folder / "ssd"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_program_s_stdout_is_its_own(tmp_path: Path) -> None:
    """Nothing is printed to stdout, no handler is added, and warnings take logging's usual way."""
    stdout, stderr = use(tmp_path, after="assert not logging.root.handlers")
    assert stdout == ""
    lines = stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["model_id_not_given"]


@pytest.mark.parametrize(
    ("level", "least"), [("debug", 10), ("INFO", 20), ("warning", 30), ("error", 40)]
)
def test_a_program_s_handlers_get_the_lines(tmp_path: Path, level: str, least: int) -> None:
    """A program's handlers get lines from FLEXKV_LOG_LEVEL on, with prefix, logger and function."""
    shape = '{"levelno": %(levelno)d, "name": "%(name)s", "by": "%(funcName)s", "told": %(told)s}'
    before = f"""
import json
class Shaped(logging.Formatter):
    def format(self, record):
        record.told = json.dumps(record.getMessage())
        return super().format(record)
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(Shaped({shape!r}))
logging.root.addHandler(handler)
"""
    stdout, stderr = use(tmp_path, before, FLEXKV_LOG_LEVEL=level, FLEXKV_LOGGING_PREFIX="rank 0")
    assert stderr == ""
    records = [json.loads(line) for line in stdout.splitlines()]
    ours = [record for record in records if record["name"].startswith("flexkv")]
    assert all(record["levelno"] >= least for record in ours)
    assert all(record["told"].startswith("[rank 0] ") for record in ours)
    found = {(record["name"], record["by"], record["levelno"]) for record in ours}
    assert (("flexkv.engine.engine", "open", 20) in found) == (least <= 20)
    assert (("flexkv.tiers.backend", "open", 30) in found) == (least <= 30)


def test_an_unknown_level_is_an_error_in_a_library_too(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An unknown log level is an error that names the setting by which it was given."""
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="FLEXKV_LOG_LEVEL='loud': must be one of debug, info"):
        make_manager()
    with pytest.raises(ConfigError, match="FLEXKV_LOG_LEVEL='loud'"):
        load_settings({"FLEXKV_LOG_LEVEL": "loud"})
    with pytest.raises(ConfigError, match="log_level='loud'"):
        configure_logging("loud")
    path = tmp_path / "flexkv.json"
    path.write_text('{"log_level": "loud"}')
    with pytest.raises(ConfigError, match="log_level='loud'"):
        load_settings({"FLEXKV_CONFIG_PATH": str(path)})


def test_settings_give_level_and_prefix(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`load_settings` applies level and prefix, from the file or the environment."""
    path = tmp_path / "flexkv.json"
    path.write_text('{"log_level": "debug", "logging_prefix": "pod-7"}')
    load_settings({"FLEXKV_CONFIG_PATH": str(path), "FLEXKV_LOG_LEVEL": "error"})
    get_logger("flexkv.test").debug("looked", blocks=3, path="/a b", text="x\ny")
    assert [record.getMessage() for record in caplog.records] == [
        "[pod-7] looked blocks=3 path='/a b' text='x\\ny'"
    ]
    load_settings({"FLEXKV_LOG_LEVEL": "critical", "FLEXKV_LOGGING_PREFIX": ""})
    get_logger("flexkv.test").error("broken")
    assert len(caplog.records) == 1


class Refusing(logging.Handler):
    """A handler that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise LookupError."""
        raise LookupError(record.getMessage())


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    """Yield a handler that gets every log line of FlexKV."""
    handler = Refusing()
    logging.getLogger("flexkv").addHandler(handler)
    yield handler
    logging.getLogger("flexkv").removeHandler(handler)


async def test_a_handler_that_raises_stops_nothing(
    make_manager: MakeManager, refusing: Refusing
) -> None:
    """The engine goes on if a log handler raises."""
    obey("debug", None)
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        put = await manager.put(np.arange(4 * PER_BLOCK), slots_of(range(4)))
        assert put.return_mask.all()


def test_repeated_lines_are_dropped_in_a_library_too(caplog: pytest.LogCaptureFixture) -> None:
    """Repeated lines are dropped, so that a slow handler or a full disk gets few."""
    obey("info", None)
    for _ in range(100):
        get_logger("flexkv.test").warning("op failed again", route="host→disk")
    assert len(caplog.records) == 10


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours are for terminals only, and can be turned off."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        configure_logging("info")
        get_logger("flexkv.test").info("hello", blocks=3)
        assert ("\x1b[" in os.read(ours, 4096).decode()) == coloured
    os.close(ours)
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    configure_logging("info", as_json=False)
    get_logger("flexkv.test").info("hello", blocks=3)
    assert "hello" in told.getvalue()
    assert "\x1b[" not in told.getvalue()

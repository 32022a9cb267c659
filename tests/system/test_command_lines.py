"""Tests that no command line ends in a stack trace, however odd it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import typer

from flexkv.cli.main import commands
from flexkv.kvmanager import KVManager

from .conftest import MODEL, PER_BLOCK, cache_config, kv_caches, slots_of

ROOT = Path(__file__).parents[2]
NUMBERS = ["", "x", "-1", "0", "1.5", "1e30", "9" * 30, "-" + "9" * 30, "nan", "inf", "-inf",
           "0x10", "\u0663", "1_0", " 1", "true"]  # fmt: skip
TEXTS = ["", " ", "x", "-", "--", "\udcff\udcfe", "\u00e9\u7bc0", "a" * 5000, "%s{}$HOME", "a\nb",
         ";", ",", "http://", "ipc://", "://"]  # fmt: skip
URLS = ["http://127.0.0.1:1/metrics", "http://127.0.0.1:99999/", "http://[", "http://\u00e9..x/",
        "file:///etc/passwd", "ftp://127.0.0.1/", "http:///", "data:,x", "http://a b/",
        "http://127.0.0.1:x/", "https://127.0.0.1:1/"]  # fmt: skip
PATHS = ["/", "/nowhere/file", "/dev/null", "/dev/zero", "/dev/full", "empty", "garbage", "folder",
         "text", "loop", "unreadable", "trace", "mooncake", "mooncake-1", "ssd", "", "a" * 300,
         "\udcff", "a/" * 3000]  # fmt: skip
BASES: dict[str, list[str]] = {
    "demo": ["--requests", "2", "--host-blocks", "300", "--ssd-blocks", "0"],
    "doctor": [],
    "explain": ["get"],
    "replay-hits": ["mooncake", "--blocks", "10", "--no-plot"],
    "serve": [],
    "stats": ["--url", "http://127.0.0.1:1/metrics"],
    "top": ["--url", "http://127.0.0.1:1/metrics", "--count", "1"],
    "vllm-demo": [],
    "remote ls": [],
    "remote verify": [],
    "remote gc": [],
    "remote clear": ["--yes"],
    "cluster status": ["--server", "ipc:///nowhere/socket"],
    "cluster reset": ["--server", "ipc:///nowhere/socket", "--yes"],
    "server status": ["--server", "ipc:///nowhere/socket"],
    "server flush": ["--server", "ipc:///nowhere/socket"],
    "server clear": ["--server", "ipc:///nowhere/socket"],
    "ssd inspect": ["ssd"],
    "ssd verify": ["ssd"],
    "ssd clear": ["ssd", "--yes"],
    "trace summary": ["trace"],
    "trace diff": ["trace", "trace"],
    "trace view": ["trace", "-o", "view.html"],
    "trace export": ["trace", "-o", "export.json"],
    "trace replay": ["trace"],
    "trace start": ["--server", "ipc:///nowhere/socket"],
    "trace stop": ["--server", "ipc:///nowhere/socket"],
}
"""Valid arguments of each command, with which it ends soon."""
SLOW = {("demo", "--requests"), ("demo", "--time-scale"), ("trace replay", "--time-scale"),
        ("top", "--count"), ("demo", "--metrics-port")}  # fmt: skip
"""Options of which only invalid values are tried, since valid ones could take very long."""
STORE = {"FLEXKV_REMOTE_CACHE_PATH": "memory://"}
SERVED = {"model": {"num_layers": 1, "num_kv_heads": 1, "head_size": 8, "dtype": "int8"},
          "settings": {"server_recv_port": "ipc:///nowhere/socket"}}  # fmt: skip


def leaves(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command with the words that call it."""
    for name, command in group.commands.items():
        words = f"{path} {name}".strip()
        if hasattr(command, "commands"):
            yield from leaves(command, words)
        else:
            yield words, command


def odd_values(words: str, parameter: Any) -> list[str]:
    """Return the values that a parameter is tried with."""
    # Some releases of typer have type_descriptor, others only type; both name the type.
    kind = str(getattr(parameter, "type_descriptor", None) or parameter.type).lower()
    if "'int'" in kind or "integer" in kind or "float" in kind:
        if (words, parameter.opts[0]) in SLOW:
            return ["", "x", "-1", "nan", "inf", "-inf", "1e400", "9" * 400]
        return NUMBERS
    if "path" in kind:
        return [*PATHS, *TEXTS]
    return [*TEXTS, *NUMBERS, *(URLS if "--url" in parameter.opts else []), "/", "garbage"]


def lines() -> Iterator[dict[str, Any]]:
    """Yield command lines of every command, with valid and odd values of each parameter."""
    found = dict(leaves(typer.main.get_command(commands)))
    assert set(found) == set(BASES)
    for words, command in found.items():
        base = [*words.split(), *BASES[words]]
        if words == "doctor":
            continue  # doctor measures for seconds
        right = {"environment": STORE} if words.startswith("remote ") else {}
        yield {"arguments": base, "right": True, **right}
        yield {"arguments": [*words.split(), "--help"], "right": True}
        yield from ({"arguments": [*base, odd]} for odd in ("--nothing", "x", "", "-", "--"))
        yield {"arguments": words.split()}
        for parameter in command.params:
            for value in odd_values(words, parameter):
                if parameter.param_type_name == "option":
                    named = "" if parameter.is_flag else value
                    yield {"arguments": [*base, parameter.opts[0], *([named] if named else [])]}
                    yield {"arguments": [*base, f"{parameter.opts[0]}={value}"]}
                else:
                    yield {"arguments": [*words.split(), value, *BASES[words][1:]]}
        for stream, where in (("out", "/dev/full"), ("out", "closed"), ("err", "closed"),
                              ("err", "/dev/full"), ("in", "closed")):  # fmt: skip
            yield {"arguments": base, stream: where}
        yield {"arguments": base, "in": "closed", "out": "closed", "err": "closed"}


def rest() -> Iterator[dict[str, Any]]:
    """Yield command lines without a command, with odd input, and in odd environments."""
    yield from ({"arguments": each} for each in (
        [], [""], ["x"], ["--version", "x"], ["--log-level"], ["--log-level", "loud", "explain"],
        ["--log-level", "", "explain", "get"], ["\udcff"], ["server"], ["ssd", "x"],
        ["ssd", "clear", "ssd"],
    ))  # fmt: skip
    for content in (
        "", "\x00\xff\xfe", "{}", "[]", "null", '{"model": 5}', '{"model": {}}', "[" * 9999,
        '{"model": {"num_layers": 1e400}, "settings": {}}', json.dumps(SERVED),
        json.dumps({**SERVED, "waits": True}), '{"model": {}, "settings": 5}',
    ):  # fmt: skip
        for extra in ([], ["--parent", "1"], ["--parent", "9" * 30], ["--parent-fd", "77"],
                      ["--parent", "-5"], ["--parent-fd", "9" * 30]):  # fmt: skip
            yield {"arguments": ["serve", "--with-parent", *extra], "stdin": content}
    for name, value in (
        ("FLEXKV_LOG_LEVEL", "loud"), ("FLEXKV_CONFIG_PATH", "garbage"),
        ("FLEXKV_CONFIG_PATH", "/"), ("FLEXKV_CONFIG_PATH", "/dev/zero"),
        ("FLEXKV_CONFIG_PATH", "\udcff"), ("FLEXKV_NUM_CPU_BLOCKS", "x"), ("FLEXKV_X", "y"),
        ("FLEXKV_SERVER_RECV_PORT", "tcp://a:1"), ("FLEXKV_SERVER_RECV_PORT", "\udcff"),
        ("TMPDIR", "/nowhere"), ("XDG_RUNTIME_DIR", "\udcff"), ("COLUMNS", "x"), ("COLUMNS", "-5"),
        ("TERM", ""), ("HOME", "/nowhere"), ("LC_ALL", "nowhere"),
    ):  # fmt: skip
        for arguments in (["server", "status"], ["explain", "get"], ["serve", "model"],
                          ["trace", "summary", "trace"], ["trace", "stop"]):  # fmt: skip
            yield {"arguments": arguments, "environment": {name: value}}


def _fill(folder: Path) -> None:
    """Make the files that the command lines name."""
    (folder / "empty").write_bytes(b"")
    (folder / "garbage").write_bytes(bytes(range(256)) * 40)
    (folder / "text").write_text("a line\nanother\n")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "unreadable").write_text("x")
    (folder / "unreadable").chmod(0)
    (folder / "model").write_text(json.dumps({**SERVED["model"], "num_layers": "x"}))
    line = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]}
    (folder / "mooncake").write_text("".join(json.dumps(line) + "\n" for _ in range(5)))
    odd = [{"hash_ids": [10**30]}, {"hash_ids": [-1]}, {"hash_ids": [2**64]}, {"timestamp": 1e300},
           {"timestamp": -1.0}]  # fmt: skip
    for number, change in enumerate(odd):
        (folder / f"mooncake-{number}").write_text(json.dumps({**line, **change}) + "\n")
    manager = KVManager(MODEL, cache_config(folder / "ssd"))
    manager.start()
    manager.register_kv_caches(kv_caches())
    with manager.trace(folder / "trace"):
        tokens = np.arange(8 * PER_BLOCK)
        manager.wait(manager.put_async(tokens, slots_of(range(8))), completely=True)
        manager.wait(manager.get_async(tokens, slots_of(range(8))))
    manager.shutdown()


def test_no_command_line_ends_in_a_stack_trace(tmp_path: Path) -> None:
    """A command line ends in time, without a stack trace, with exit status 0, 1 or 2.

    This tries a random sample; COMMAND_LINES sets its size and COMMAND_SEED the seed.
    """
    _fill(tmp_path)
    everything = [*lines(), *rest()]
    random = Random(int(os.environ.get("COMMAND_SEED", "1")))
    asked = random.sample(everything, int(os.environ.get("COMMAND_LINES", "120")))
    asked += [line for line in everything if line.get("right")]
    for number in range(5):
        asked.append({"arguments": ["replay-hits", f"mooncake-{number}", "--no-plot"]})
        asked.append({"arguments": ["demo", "--trace", f"mooncake-{number}", *BASES["demo"]]})
    done = subprocess.run(
        [sys.executable, "tests/system/command_lines.py", tmp_path],
        input="".join(json.dumps(line) + "\n" for line in asked),
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ended) == len(asked), done.stderr
    faults = [
        (line, end["status"], end["stderr"][-1500:])
        for line, end in zip(asked, ended, strict=True)
        if not _is_plain(line, end)
    ]
    assert not faults, f"{len(faults)} of {len(asked)}: {faults[:3]}"


def _is_plain(line: dict[str, Any], end: dict[str, Any]) -> bool:
    """Return whether a command line ended as it should have."""
    if end["status"] not in (0, 1, 2) or "Traceback" in end["stderr"]:
        return False
    words = line["arguments"]
    is_help, is_served = "--help" in words, "nowhere" in str(words) or "127.0.0.1:1" in str(words)
    may_serve = words[0] not in ("serve", "vllm-demo") and not is_served
    return end["status"] == 0 or not line.get("right") or not (is_help or may_serve)

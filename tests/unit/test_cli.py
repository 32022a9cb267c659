"""The `flexkv` command: what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexkv.cli import main
from flexkv.cli.main import app, commands
from flexkv.common.errors import ConfigError
from flexkv.testing.known_bytes import KnownDevice
from flexkv.trace.mooncake import read_trace

RUNNER = CliRunner()
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FLEXKV_")},
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
SMALL = ["demo", "--requests", "400", "--host-blocks", "400", "--ssd-blocks", "2000"]
TRACE_LINE = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]}


def test_the_demo_finds_no_mismatch_and_uses_both_tiers(tmp_path: Path) -> None:
    """A small demo evicts, reloads from SSD, and finds every byte right."""
    figures_file = tmp_path / "figures.json"
    result = RUNNER.invoke(
        commands, [*SMALL, "--ssd-dir", str(tmp_path / "ssd"), "--json", str(figures_file)]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(figures_file.read_text())
    assert figures["mismatches"] == 0
    assert figures["requests"] == 400
    assert figures["evicted_blocks"]["host"] > 0
    assert figures["moved_gb"]["disk→host"] > 0


def test_the_demo_says_what_it_runs_and_that_every_byte_was_right(tmp_path: Path) -> None:
    """The demo describes its tiers and its result in a table, without log lines."""
    command = [sys.executable, "-m", "flexkv.cli.main", "demo", "--requests", "300"]
    command += ["--host-blocks", "300", "--ssd-blocks", "400"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    told = " ".join(done.stdout.split())
    assert "300 blocks of 16 tokens (128 KiB) in host memory, and for 400 on SSD" in told
    assert "blocks never written │ disk" in told
    assert "every block that was loaded had the bytes that were stored" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--host-blocks", "100000000"), ("--ssd-blocks", "1000000000"), ("--ssd-dir", "/no/such/ssd")],
)
def test_the_demo_names_the_option_that_cannot_be(option: str, value: str) -> None:
    """An impossible value is an error that names the option, not the key that the option sets."""
    result = RUNNER.invoke(commands, [*SMALL, option, value])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == option
    assert "num_" not in str(result.exception)


def test_the_demo_reports_a_wrong_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped byte after a get is a mismatch, and the demo fails."""
    check = KnownDevice.mismatches

    def tampered(self: KnownDevice, block_ids: list[int], keys: list[bytes]) -> int:
        if block_ids:
            self.kv_caches[3].view("u1")[1, block_ids[0], 0, 0, 0] ^= 1
        return check(self, block_ids, keys)

    monkeypatch.setattr(KnownDevice, "mismatches", tampered)
    result = RUNNER.invoke(commands, [*SMALL, "--ssd-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "came back with wrong bytes" in result.output


def test_the_demo_replays_a_trace(tmp_path: Path) -> None:
    """Equal hash ids are equal prefixes, so the requests after the first one hit."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(TRACE_LINE) + "\n" for _ in range(40)))
    figures_file = tmp_path / "figures.json"
    arguments = ["demo", "--trace", str(trace), "--ssd-blocks", "0", "--json", str(figures_file)]
    result = RUNNER.invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(figures_file.read_text())["hit_rate"]["host"] > 0.5


def test_a_bad_trace_line_is_named(tmp_path: Path) -> None:
    """The error has the line number, or the path of a file that is missing."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps(TRACE_LINE) + "\n" + '{"timestamp": 5}\n')
    with pytest.raises(ConfigError, match="line 2"):
        list(read_trace(trace))
    assert len(list(read_trace(trace, limit=1))) == 1
    with pytest.raises(ConfigError, match="nowhere"):
        list(read_trace(tmp_path / "nowhere"))


def test_doctor_tells_what_is_there(tmp_path: Path) -> None:
    """Each finding of the doctor has a name and a result, and advice where it could be better."""
    result = RUNNER.invoke(commands, ["doctor", "--dir", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    findings = json.loads(result.output)
    assert {"io_uring", "O_DIRECT", "memlock", "memory copy", "CUDA"} <= set(findings)
    assert all(finding["good"] or finding["advice"] for finding in findings.values())
    assert not list(tmp_path.iterdir())
    assert "FlexKV doctor" in RUNNER.invoke(commands, ["doctor", "--dir", str(tmp_path)]).output


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        (["get", "--host", "4", "--disk", "4"], "disk→host 4 blocks"),
        (["put", "--new", "16"], "host→disk 8 blocks"),
        (["prefetch", "--disk", "3", "--dot"], "digraph plan"),
    ],
)
def test_explain_draws_a_plan(arguments: list[str], drawn: str) -> None:
    """`explain` draws a plan as text, or as DOT on request."""
    assert drawn in RUNNER.invoke(commands, ["explain", *arguments]).output


def test_version_and_help() -> None:
    """`--version` and `--help` work."""
    assert RUNNER.invoke(commands, ["--version"]).output.startswith("flexkv ")
    assert "demo" in RUNNER.invoke(commands, ["--help"]).output


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (ConfigError("ssd_cache_dir", "/x", "is not a directory"), 2, "ssd_cache_dir='/x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(
    raised: BaseException,
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Our errors exit with 2 and ctrl-C with 130; both print one line and no traceback."""

    def failing() -> None:
        raise raised

    monkeypatch.setattr(main, "commands", failing)
    with pytest.raises(SystemExit) as caught:
        app()
    assert caught.value.code == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert told in lines[0]


def test_ctrl_c_while_the_command_is_imported_prints_no_traceback() -> None:
    """Ctrl-C during the imports, which can take a second, exits with 130 and prints nothing."""
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'flexkv.cli.demo':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from flexkv.cli.entry import app\n"
        "app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["serve"], {}, "flexkv: model: name a JSON file that describes the model"),
        (["serve", "m.json"], {"FLEXKV_CPU_CACHE_GBS": "1"},
         "flexkv: FLEXKV_CPU_CACHE_GBS: unknown variable; the nearest known one is FLEXKV_CPU_"),
        (["serve", "m.json"], {"FLEXKV_SSD_CACHE_GB": "1"},
         "flexkv: ssd_cache_dir: an SSD tier needs at least one directory: set this key"),
        (["serve", "m.json"], {"FLEXKV_CPU_CACHE_GB": "1000"},
         "flexkv: cpu_cache_gb=1000: needs 1,000.00 GB of memory, but the "),
        (["serve", "m.json"], {"FLEXKV_LOG_LEVEL": "loud"}, "flexkv: FLEXKV_LOG_LEVEL='loud': mus"),
        (["serve", "short.json"], {}, "flexkv: num_kv_heads: is required: it has no default"),
        (["server", "status", "--server", "ipc:///no/socket"], {},
         "flexkv: the server at /no/socket is not available: No such file or directory: is one"),
        (["stats", "--url", "http://127.0.0.1:1/metrics"], {},
         "flexkv: url='http://127.0.0.1:1/metrics': there are no metrics (Connection refused): is"),
        (["ssd", "inspect", "."], {}, "is not a directory of an SSD tier: superblock.flexkv is m"),
    ],
)  # fmt: skip
def test_a_newcomers_mistake_is_told_in_plain_words(
    arguments: list[str], environment: dict[str, str], told: str, tmp_path: Path
) -> None:
    """A mistake gives one line that says what is wrong, in the user's words, and what to do."""
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_size": 8, "dtype": "float16"}
    (tmp_path / "m.json").write_text(json.dumps(shape))
    (tmp_path / "short.json").write_text('{"num_layers": 4}')
    done = subprocess.run(
        [sys.executable, "-m", "flexkv.cli.main", *arguments], cwd=tmp_path,
        env={**ENVIRONMENT, "FLEXKV_LOG_LEVEL": "error", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1

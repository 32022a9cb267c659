"""Secrets are never quoted, whatever is wrong with a configuration and wherever they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.config import CacheConfig, ModelConfig, Settings, settings_of
from flexkv.common.config_keys import MASK
from flexkv.common.errors import ConfigError
from flexkv.observe.logs import configure_logging
from flexkv.server.launch import told_of
from flexkv.settings import load_file, load_settings

SECRET = "q7ZkVb93xTwe5Jr"
PIECES = [SECRET[at : at + 6] for at in range(len(SECRET) - 5)]
"""Parts of the secret, as a cut file has them; they must not be shown either."""

YAML_FLAT = f"""\
tokens_per_block: 16
key_secret: {SECRET}
redis_host: localhost
redis_password: "{SECRET}"
num_cpu_blocks: 1000
remote_config_custom:
  access_key: {SECRET}
  nested: [{SECRET}, {{token: {SECRET}}}]
ssd_cache_dir:
  - /data/flexkv
log_level: info
"""
YAML_NESTED = f"""\
server_recv_port: ipc:///tmp/flexkv/socket
cache_config:
  remote_config_custom: {{"secret": '{SECRET}', endpoint: "s3.example.com"}}
  redis_port: 6379
  key_secret: >-
    {SECRET}
  evict_ratio: 0.05
instance_num: 2
"""
JSON_NESTED = f"""\
{{ "server_recv_port": "ipc:///tmp/flexkv/socket",   // a comment
  "cache_config": {{ "key_secret": "{SECRET}", "tokens_per_block": 16,
    'redis_password': '{SECRET}',
    "remote_config_custom": {{ "secret_key": "{SECRET}", "list": ["{SECRET}", 5] }},
    "num_cpu_blocks": 50000, }},
  "instance_num": 1 }}
"""
FILES = {"flat.yaml": YAML_FLAT, "nested.yaml": YAML_NESTED, "nested.json": JSON_NESTED}

SPOILERS = [
    "{", "}", "[", "]", ":", ",", "'", '"', "\n", "  ", "\t", "#", "- ", "? ", "*", "&", "!",
    "!!int ", "!!bool ", "!!timestamp ", "!!binary ", "%", "@", "`", "|", ">", "\\", "\\x", "//",
    "/*", "\0", "\x01", "\udcff", "é", "key_secret", "num_cpu_blocks: ", "=", "<<: ", "---\n",
    "...",
]  # fmt: skip


def everything_told(error: BaseException) -> str:
    """Return every text by which an error and its causes may be shown."""
    told = ["".join(traceback.format_exception(error))]
    seen: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for each in seen:
        if each is not None:
            told += [str(each), repr(each), repr(each.args), repr(vars(each))]
    return "\n".join(told)


def check_hidden(told: str) -> None:
    """Check that a text has neither the secret nor a piece of it."""
    assert [piece for piece in PIECES if piece in told] == [], told


def check_settings(content: bytes, name: str, folder: Path) -> ConfigError | None:
    """Load settings from a file with some content; return the error, which must show no secret."""
    path = folder / name
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            settings = load_settings({"FLEXKV_CONFIG_PATH": str(path)})
        except ConfigError as error:
            check_hidden(everything_told(error))
            return error
        finally:
            check_hidden(" ".join(str(warning.message) for warning in warned))
    secret = {"key_secret", "redis_password", "remote_config_custom"}
    check_hidden(repr(settings.cache_config.model_dump(include=secret)))
    return None


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_sound_as_they_are(name: str, tmp_path: Path) -> None:
    """The files below load as they are, and neither `repr` nor a dump shows their secrets."""
    assert check_settings(FILES[name].encode(), name, tmp_path) is None
    settings = load_settings({"FLEXKV_CONFIG_PATH": str(tmp_path / name)})
    cache = settings.cache_config
    assert cache.key_secret.get_secret_value() == SECRET
    for told in (repr(settings), str(settings), settings.model_dump_json(), str(vars(cache))):
        check_hidden(told)
    assert SECRET in json.dumps(told_of(settings))  # the server's process alone gets it


@given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_never_quoted(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No error quotes the secret of a file with random insertions, cuts and moved lines."""
    lines = FILES[name].splitlines(keepends=True)
    numbers = st.integers(0, len(lines) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        at, other = data.draw(numbers), data.draw(numbers)
        at, other = min(at, len(lines) - 1), min(other, len(lines) - 1)
        line = lines[at]
        match data.draw(
            st.sampled_from(["spoil", "cut", "drop", "repeat", "join", "indent", "swap"])
        ):
            case "spoil":
                where = data.draw(st.integers(0, len(line)))
                lines[at] = line[:where] + data.draw(st.sampled_from(SPOILERS)) + line[where:]
            case "cut":
                begin = data.draw(st.integers(0, len(line)))
                end = data.draw(st.integers(begin, len(line)))
                lines[at] = line[:begin] + line[end:]
            case "drop":
                lines[at] = ""
            case "repeat":
                lines.insert(other, line)
            case "join":
                lines[at] = line.rstrip("\n") + data.draw(st.sampled_from(["", " ", ","]))
            case "indent":
                lines[at] = data.draw(st.sampled_from(["  ", "\t", "    "])) + line
            case "swap":
                lines[at], lines[other] = lines[other], lines[at]
    text = "".join(lines).encode(errors="surrogateescape")
    check_settings(text, name, tmp_path_factory.getbasetemp())


BROKEN = {
    "undefined alias": f"key_secret: *{SECRET}",
    "duplicate anchor": f"a: &{SECRET} 1\nb: &{SECRET} 2",
    "tag": f"key_secret: !{SECRET} x",
    "tag handle": f"key_secret: !{SECRET}!x y",
    "directive": f"%{SECRET}\n---\na: 1",
    "integer": f"key_secret: !!int {SECRET}",
    "bool": f"key_secret: !!bool {SECRET}",
    "float": f"key_secret: !!float {SECRET}",
    "timestamp": f"key_secret: !!timestamp {SECRET}",
    "binary": f"key_secret: !!binary {SECRET}",
    "python": f"key_secret: !!python/object/apply:os.system [{SECRET}]",
    "no space": f"{{key_secret:{SECRET}}}",
    "set": f"{{key_secret, {SECRET}}}",
    "one word": f"key_secret:{SECRET}",
    "key and value exchanged": f"{SECRET}: key_secret",
    "list": f"- key_secret: {SECRET}",
    "another key's": f"redis_host:\n  key_secret: {SECRET}",
    "another key's list": f"redis_port:\n- key_secret: {SECRET}",
    "another key's words": f"redis_port: 6379\n  key_secret {SECRET}",
    "cache_config": f"cache_config: {SECRET}",
    "cache_config's list": f"cache_config:\n- key_secret: {SECRET}",
    "two values": f"key_secret: {SECRET}\ncache_config: {{key_secret: x{SECRET}}}",
    "complex key": f"? {{key_secret: {SECRET}}}\n: 5",
    "key of a date": f"2001-01-01: {SECRET}",
    "unknown keys": f"password: {SECRET}",
    "unknown key, like a secret one": f"key_secre: {SECRET}",
    "unknown key, unlike any": f"aws: {SECRET}",
    "wrong type": f"key_secret: [{SECRET}]",
    "wrong type of options": f"remote_config_custom: {SECRET}",
    "options that are no JSON": f"remote_config_custom: '{{\"a\": {SECRET}'",
    "keys of options": f"remote_config_custom: {{5: {SECRET}}}",
    "model's key": f"num_layers: {SECRET}",
    "swallowed by a path": f'ssd_cache_dir: "/data\nkey_secret: {SECRET}"',
    "swallowed by an address": f"server_recv_port: |\n  /a\n  key_secret: {SECRET}",
    "login in an address": f"remote_cache_path: [5, 's3://user:{SECRET}@bucket']",
    "deep": "[" * 5000 + SECRET,
    "not UTF-8": f"key_secret: {SECRET}\udcff",
    "control character": f"key_secret: {SECRET}\x07",
}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("kind", BROKEN)
def test_what_parsers_quote_is_not_told(kind: str, suffix: str, tmp_path: Path) -> None:
    """Each of these faults is an error that shows no text of the file."""
    content = BROKEN[kind].encode(errors="surrogateescape")
    assert check_settings(content, f"a.{suffix}", tmp_path) is not None


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.yaml", "a: 1\nb: [", "expected the node content at line 2, column 5"),
        ("a.yaml", 'a: "\\q"', "found unknown escape character at line 1, column 6"),
        ("a.yaml", "a: *b", "found undefined alias at line 1, column 4"),
        ("a.yaml", "a: !!int x", "a value does not match its tag or format"),
        ("a.json", '{"a": 1,\n b c}', "unexpected character at line 2, column 4"),
        ("a.json", '{"a": 1', "ends too soon at line 1, column 8"),
        ("a.json", "[" * 50_000, "nested too deeply"),
        ("a.json", '{"a": "\udcff"}', "byte 7 is not UTF-8"),
    ],
)
def test_the_place_of_a_fault_is_told(name: str, text: str, why: str, tmp_path: Path) -> None:
    """A syntax error has line and column, in the parser's words or ours."""
    path = tmp_path / name
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert caught.value.why == f"syntax: {why}"


@pytest.mark.parametrize(
    "values",
    [
        {"key_secret": [SECRET]},
        {"key_secret": {"a": SECRET}},
        {"redis_password": SECRET.encode() + b"\xff"},
        {"remote_config_custom": [SECRET]},
        {"remote_config_custom": {5: SECRET}},
        {"remote_config_custom": f'{{"a": "{SECRET}"'},
        {"remote_config_custom": "[" * 100_000 + SECRET},
        {"secret": SECRET},
        {"credentials": {"secret": SECRET}},
        {SECRET: 5},
        {"redis_host": {"password": SECRET}},
        {"redis_host": [SECRET]},
        {"redis_port": f"6379 {SECRET}"},
        {"redis_port": f"redis://:{SECRET}@host"},
        {"key_secret": SECRET, "tokens_per_block": 0},
        {"key_secret": SECRET, "enable_ssd": True},
    ],
)
def test_errors_of_values_in_code_tell_no_secret(values: dict[str, Any]) -> None:
    """Errors about values given in code show no secret, even if the fault is in another key."""
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**values)
    check_hidden(everything_told(caught.value))
    with pytest.raises(ConfigError) as caught:
        settings_of({}, values)
    check_hidden(everything_told(caught.value))


@pytest.mark.parametrize(
    "environment",
    [
        {"FLEXKV_KEY_SECRT": SECRET},
        {"FLEXKV_PASSWORD": SECRET},
        {"FLEXKV_REMOTE_CONFIG_CUSTOM": f"{{'a': '{SECRET}'}}"},
        {"FLEXKV_REMOTE_CONFIG_CUSTOM": SECRET},
        {"FLEXKV_CACHE_CONFIG": f"{{key_secret: {SECRET}}}"},
    ],
)
def test_errors_of_the_environment_tell_no_secret(environment: Mapping[str, str]) -> None:
    """Errors about environment variables show no secret, whichever variable it is in."""
    with pytest.raises(ConfigError) as caught:
        load_settings(environment)
    check_hidden(everything_told(caught.value))


def test_addresses_are_shown_without_their_passwords() -> None:
    """`repr` shows addresses with their logins masked."""
    cache = CacheConfig(remote_cache_path=f"s3://me:{SECRET}@bucket/prefix;file:///data")
    check_hidden(repr(cache))
    assert f"s3://{MASK}@bucket/prefix" in repr(cache)
    settings = Settings(cache_config=cache)
    check_hidden(repr(settings))


@pytest.mark.parametrize("name", ["num_cpu_blockz", "tokens_per_blok", "layers"])
def test_the_name_of_an_unknown_key_is_told_if_it_is_like_a_known_one(name: str) -> None:
    """An unknown key is named if it resembles a known one; other unknown keys may be secrets."""
    with pytest.raises(ConfigError, match=name):
        (ModelConfig if name == "layers" else CacheConfig)(**{name: 5})
    with pytest.raises(ConfigError, match="number 2 is an unknown key; the nearest known one is"):
        CacheConfig(num_cpu_blocks=5, **{f"x{name[::-1]}x": 5})


def _raise(values: Mapping[str, Any]) -> None:
    secret = values["key_secret"]  # noqa: F841 -- what a traceback with variables would show
    CacheConfig(**values)


@pytest.mark.parametrize("as_json", [True, False, None])
def test_logged_tracebacks_show_no_variables(
    as_json: bool | None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Logged tracebacks show no variables, as JSON, on a console or in records of `logging`."""
    if as_json is not None:
        configure_logging(as_json=as_json)
    from flexkv.observe.logs import get_logger

    try:
        _raise({"key_secret": SECRET, "tokens_per_block": 0})
    except ConfigError:
        get_logger("test").exception("went wrong")
    printed = capsys.readouterr()
    told = printed.out + printed.err + "".join(record.getMessage() for record in caplog.records)
    assert "tokens_per_block=0" in told
    check_hidden(told)


SERVE, STATUS = ["serve", "{folder}/model.json"], ["server", "status"]
CHILD = ["serve", "--with-parent"]
SHAPE = '{"num_layers": 1, "num_kv_heads": 1, "head_size": 8, "dtype": "int8"}'
COMMANDS: list[tuple[list[str], dict[str, str], str]] = [
    (SERVE, {"model.json": f'{{"num_layers": 2, "key_secret": "{SECRET}"'}, ""),
    (SERVE, {"model.json": f'{{"num_layers": 2, "secret": "{SECRET}"}}'}, ""),
    (SERVE, {"model.json": f'{{"num_layers": ["{SECRET}"]}}'}, ""),
    (STATUS, {"flexkv.yaml": f"key_secret: [{SECRET}"}, ""),
    (STATUS, {"flexkv.yaml": f"key_secret: [{SECRET}]"}, ""),
    (CHILD, {}, f'{{"settings": {{"key_secret": "{SECRET}"}}\n'),
    (CHILD, {}, f'{{"settings": "{SECRET}", "model": ["{SECRET}"]}}\n'),
    (CHILD, {}, f'["{SECRET}"]\n'),
    (CHILD, {}, f'{{"model": {SHAPE}, "settings": {{"key_secret": ["{SECRET}"]}}}}\n'),
]


@pytest.mark.parametrize(("words", "files", "stdin"), COMMANDS)
def test_the_command_tells_no_secret(
    words: list[str], files: dict[str, str], stdin: str, tmp_path: Path
) -> None:
    """The command reports a fault in one line without secrets, and exits with 2."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    environment = {**os.environ}
    if "flexkv.yaml" in files:
        environment["FLEXKV_CONFIG_PATH"] = str(tmp_path / "flexkv.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "flexkv.cli.main", *(w.format(folder=tmp_path) for w in words)],
        input=stdin, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("flexkv: ")
    assert len(done.stderr.splitlines()) == 1
    check_hidden(done.stdout + done.stderr)

"""`flexkv remote`: what the commands say and do, over a directory as the store."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.errors import ConfigError
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.tiers.remote_gc.collector import generation_of
from flexkv.tiers.remote_gc.lease import Lease
from tests.remote_pools import POOL, fill, span_key

RUNNER = CliRunner()
DAY_S = 24 * 3600
SECRET = "a-secret-of-tests"


class Shared:
    """A directory that is the store, and the environment that names it.

    Attributes:
        folder: the directory.
    """

    def __init__(self, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for name in list(os.environ):
            if name.startswith("FLEXKV_"):
                environment.delenv(name)
        self.set = environment.setenv
        self.set("FLEXKV_REMOTE_CACHE_PATH", f"file://{folder}")
        self.set("FLEXKV_NUM_REMOTE_BLOCKS", "40")

    def fill(self, generation: int = 0, spans: int = 5) -> None:
        """Store a pool: so many spans of the chain, and a leaf."""
        store = open_store(f"file://{self.folder}", {}, RemoteOptions())
        asyncio.run(fill(store, spans, generation_of(POOL, generation)))
        store.close()

    def file(self, span: int) -> Path:
        """Return the file of a span."""
        return self.folder / POOL.object_name(span_key(span))

    def age(self, span: int, seconds: float) -> None:
        """Make a span older."""
        modified_s = self.file(span).stat().st_mtime - seconds
        os.utime(self.file(span), (modified_s, modified_s))

    def run(self, *words: str, status: int = 0, answer: str = "") -> Result:
        """Run a command, and check its exit status."""
        result = RUNNER.invoke(commands, ["remote", *words], input=answer)
        assert result.exit_code == status, (result.output, result.exception)
        return result

    def json(self, *words: str, status: int = 0) -> Any:
        """Return what a command prints as JSON."""
        return json.loads(self.run(*words, "--json", status=status).stdout)

    def spans(self) -> set[int]:
        """Return which spans of the prompt are there."""
        return {span for span in range(16) if self.file(span).exists()}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """Return an empty store."""
    return Shared(tmp_path / "kv", monkeypatch)


def test_ls_lists_pools_with_model_size_and_age(shared: Shared) -> None:
    """Each pool has its model, generation, spans, blocks, bytes and ages, as a table or JSON."""
    shared.fill()
    shared.age(1, 2 * DAY_S)
    shared.fill(generation=1, spans=1)
    (shared.folder / POOL.generations).mkdir()
    (shared.folder / POOL.generations / "1").write_text("\n")
    pools = {pool["pool"]: pool for pool in shared.json("ls")}
    base, newer = pools[POOL.name], pools[generation_of(POOL, 1).name]
    assert base["model"] == newer["model"] == "a-model"
    assert (base["generation"], newer["generation"]) == ("0 (latest: 1)", "1")
    assert (base["spans"], base["blocks"], newer["spans"]) == (6, 24, 2)
    assert base["oldest_days"] == pytest.approx(2, abs=0.01)
    assert base["newest_days"] == pytest.approx(0, abs=0.01)
    shown = shared.run("ls").stdout
    assert POOL.name[:6] in shown
    assert "oldest" in shown


def test_verify_finds_and_deletes_wrong_objects(shared: Shared) -> None:
    """A damaged object is named, and stays unless it is to be deleted; then all is right."""
    shared.fill()
    assert shared.json("verify")["spans read"] == 6
    content = bytearray(shared.file(2).read_bytes())
    content[100] ^= 1
    shared.file(2).write_bytes(content)
    shutil.copyfile(shared.file(3), shared.file(4))
    found = shared.json("verify", status=1)
    assert (found["spans read"], found["wrong"], found["deleted"]) == (6, 2, 0)
    assert {text.split(":")[0] for text in found["wrong objects"]} == {
        POOL.object_name(span_key(span)) for span in (2, 4)
    }
    assert shared.json("verify", "--repair", status=1)["deleted"] == 2
    assert shared.spans() == {0, 1, 3}
    assert "wrong" in shared.run("verify").stdout


def test_verify_reads_a_sample_or_one_pool(shared: Shared) -> None:
    """Only a part of the spans is read if wanted, and only pools whose names begin as given."""
    shared.fill(spans=16)
    assert 0 < shared.json("verify", "--sample", "0.5")["spans read"] < 17
    assert shared.json("verify", "--sample", "0")["spans read"] == 0
    assert shared.json("verify", "--pool", POOL.name[:5])["spans read"] == 17
    result = RUNNER.invoke(commands, ["remote", "verify", "--pool", "x"])
    assert isinstance(result.exception, ConfigError)


def test_gc_deletes_what_is_over_the_budget_or_too_old(shared: Shared) -> None:
    """The oldest spans go until the budget holds; a dry run deletes nothing."""
    shared.fill(spans=12)
    for span in range(12):
        shared.age(span, (12 - span) * DAY_S)
    dry = shared.json("gc", "--dry-run")[POOL.name]
    assert (dry["spans"], dry["victims"], dry["deleted"]) == (13, 3, 0)
    assert shared.spans() == set(range(12))
    assert shared.json("gc")[POOL.name]["deleted"] == 3
    assert shared.spans() == set(range(3, 12))
    shared.set("FLEXKV_REMOTE_TTL_S", str(6.5 * DAY_S))
    done = shared.json("gc")[POOL.name]
    assert (done["expired"], done["deleted"]) == (3, 3)
    assert shared.spans() == set(range(6, 12))
    assert "victims" in shared.run("gc").stdout


def test_gc_leaves_it_to_an_engine_that_collects(shared: Shared) -> None:
    """While an engine has the lease, the command refuses; a dry run is allowed."""
    shared.fill(spans=12)
    store = open_store(f"file://{shared.folder}", {}, RemoteOptions())
    assert asyncio.run(Lease(Requests(store, RemoteOptions())).hold(POOL))
    store.close()
    assert "refused" in shared.json("gc", status=1)[POOL.name]
    assert shared.spans() == set(range(12))
    assert shared.json("gc", "--dry-run")[POOL.name]["victims"] == 3


def test_clear_begins_a_generation(shared: Shared) -> None:
    """Clear asks, begins the next generation, and deletes older spans only if told to."""
    shared.fill()
    generations = shared.folder / POOL.generations
    shared.run("clear", status=1, answer="n\n")
    assert not generations.exists()
    assert "6 spans" in shared.run("clear", answer="y\n").stdout
    assert [each.name for each in generations.iterdir()] == ["1"]
    assert len(shared.spans()) == 5
    assert "deleted 6 spans" in shared.run("clear", "--delete", "--yes").stdout
    assert sorted(each.name for each in generations.iterdir()) == ["1", "2"]
    assert shared.spans() == set()


def test_an_empty_store_is_no_error(shared: Shared) -> None:
    """Commands on a store without pools do nothing."""
    assert shared.json("ls") == []
    assert shared.json("verify")["spans read"] == 0
    assert shared.json("gc") == {}
    shared.run("clear", "--yes")


def test_commands_need_a_store(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address the commands name the key that is missing."""
    monkeypatch.delenv("FLEXKV_REMOTE_CACHE_PATH")
    result = RUNNER.invoke(commands, ["remote", "ls"])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == "remote_cache_path"


def test_doctor_tries_the_remote_tier(shared: Shared) -> None:
    """The doctor writes, reads and deletes an object, and tells how fast that was."""
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    finding = json.loads(result.stdout)["remote tier"]
    assert finding["good"]
    assert "MB/s" in finding["found"]
    assert "ms a request" in finding["found"]
    assert [each for each in shared.folder.rglob("*") if each.is_file()] == []


def test_doctor_says_why_the_remote_tier_cannot_be_used(shared: Shared) -> None:
    """A store that does not answer is a fatal finding, without the credentials."""
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    shared.set("FLEXKV_REMOTE_CACHE_PATH", "s3://bucket/kv")
    custom = {"endpoint": "http://127.0.0.1:1", "access_key": "me", "secret_key": SECRET}
    shared.set("FLEXKV_REMOTE_CONFIG_CUSTOM", json.dumps(custom))
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    assert result.exit_code == 1, result.output
    finding = json.loads(result.stdout)["remote tier"]
    assert finding["fatal"]
    assert "s3://bucket/kv" in finding["found"]
    assert SECRET not in result.output

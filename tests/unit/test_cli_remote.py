"""`flexkv remote`: what the commands say and do, over a directory as the store."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.cli.remote_store import Session, run
from flexkv.common.errors import ConfigError, RemoteError
from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.round_trip import round_trip
from flexkv.settings import load_settings
from flexkv.tiers.remote_gc.collector import generation_of
from flexkv.tiers.remote_gc.lease import LEASE_S, Lease, folder_of
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
    assert base["gc"] == "no"
    lease = shared.folder / folder_of(POOL) / "3"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text("an engine")
    collected = {pool["pool"]: pool["gc"] for pool in shared.json("ls")}
    assert collected == {POOL.name: "yes", generation_of(POOL, 1).name: "no"}
    os.utime(lease, (0, time.time() - 2 * LEASE_S))
    assert {pool["gc"] for pool in shared.json("ls")} == {"no"}
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
    asked = shared.run("clear", status=1, answer="n\n").stdout
    assert "Begin a new generation without the 6 spans of 1 pool at" in asked
    assert not generations.exists()
    told = shared.run("clear", answer="y\n").stdout
    assert told.endswith("began a new generation; engines will delete the 6 older spans\n")
    assert [each.name for each in generations.iterdir()] == ["1"]
    assert len(shared.spans()) == 5
    assert "deleted 6 spans" in shared.run("clear", "--delete", "--yes").stdout
    assert sorted(each.name for each in generations.iterdir()) == ["1", "2"]
    assert shared.spans() == set()


def test_an_empty_store_is_no_error(shared: Shared) -> None:
    """Commands on a store without pools do nothing, and say that there is none."""
    assert shared.json("ls") == []
    assert shared.json("verify")["spans read"] == 0
    assert shared.json("gc") == {}
    for command in ("ls", "gc", "clear"):
        assert shared.run(command).stdout == "the store has no pool\n"


def test_tables_fit_into_a_terminal(shared: Shared) -> None:
    """In 80 columns the list shows how each pool's name begins, and every figure whole."""
    shared.fill()
    shared.fill(generation=1)
    shown = shared.run("ls").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert f"{POOL.name[:8]} " in shown
    assert "…" not in shown
    assert shared.json("ls")[0]["pool"] == POOL.name
    assert shared.run("verify", "--pool", POOL.name[:8]).stdout


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("gc",), ("clear", "--yes")])
def test_progress_is_for_terminals(shared: Shared, command: tuple[str, ...]) -> None:
    """Where standard error is no terminal, such as in a job's log, no bars are drawn."""
    shared.fill()
    assert shared.run(*command).stderr == ""


def test_sigterm_ends_a_command_as_ctrl_c_does(shared: Shared) -> None:
    """SIGTERM cancels the work, which may still leave the store tidy; the status says why."""
    steps = []

    async def work(session: Session) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("tidied")

    with pytest.raises(typer.Exit) as ended:
        run(load_settings().cache_config, work)
    assert (ended.value.exit_code, steps) == (143, ["tidied"])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_commands_need_a_store(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address, or with two, the commands name the key that is wrong."""
    for path in (None, "s3://one;s3://two"):
        monkeypatch.delenv("FLEXKV_REMOTE_CACHE_PATH")
        if path is not None:
            shared.set("FLEXKV_REMOTE_CACHE_PATH", path)
        result = RUNNER.invoke(commands, ["remote", "ls"])
        assert isinstance(result.exception, ConfigError)
        assert str(result.exception).startswith("remote_cache_path: set it to the one address")
        shared.set("FLEXKV_REMOTE_CACHE_PATH", "")


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


@pytest.mark.parametrize("kind", ["touch", "pages"])
def test_doctor_tries_all_that_an_engine_does(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A store that refuses to list, or to touch an object, is a finding, too."""

    def refuse(self: DirectoryStore, name: str) -> None:
        raise RemoteError("the store", kind, "status 403", is_lasting=True)

    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    monkeypatch.setattr(DirectoryStore, kind, refuse)
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    assert result.exit_code == 1, result.output
    assert f"{kind} failed: status 403" in json.loads(result.stdout)["remote tier"]["found"]


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
    assert "connection was refused" in finding["found"]
    assert "credentials" in finding["advice"]
    assert SECRET not in result.output


def test_doctor_advises_to_look_at_the_key_that_is_wrong(shared: Shared) -> None:
    """A refused option of the store's client is no reason to look at its address."""
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    shared.set("FLEXKV_REMOTE_CACHE_PATH", "s3://bucket/kv")
    shared.set("FLEXKV_REMOTE_CONFIG_CUSTOM", json.dumps({"endpont": "http://127.0.0.1:1"}))
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    finding = json.loads(result.stdout)["remote tier"]
    assert (result.exit_code, finding["fatal"]) == (1, True)
    assert finding["advice"] == "see remote_config_custom in the configuration"


def test_doctor_says_what_it_waits_for(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows what is tried, and for how long; a file has only the findings."""
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    for is_terminal in (True, False):
        if is_terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        else:
            monkeypatch.delenv("FORCE_COLOR")
        result = RUNNER.invoke(commands, ["doctor", "--json"])
        assert result.exit_code == 0, result.output
        assert ("trying directory" in result.stderr) == is_terminal


def test_doctor_names_the_extra_that_is_missing(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store's client is not installed, no key of the configuration is wrong."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    shared.set("FLEXKV_REMOTE_CACHE_PATH", "s3://bucket/kv")
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    finding = json.loads(result.stdout)["remote tier"]
    assert (result.exit_code, finding["fatal"]) == (1, True)
    assert "pip install 'flexkv[remote]'" in finding["found"]
    assert finding["advice"] == "install what is missing"


def test_doctor_says_what_a_directory_needs(shared: Shared) -> None:
    """A directory has no address and no credentials: the advice is about its mount and rights."""
    shared.set("FLEXKV_ENABLE_REMOTE", "1")
    shared.folder.parent.joinpath("kv").write_text("a file")
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    finding = json.loads(result.stdout)["remote tier"]
    assert (result.exit_code, finding["fatal"]) == (1, True)
    assert "mounted" in finding["advice"]


@pytest.mark.parametrize(
    ("key", "switch"),
    [("remote_cache_path", "enable_remote"),
     ("mooncake_store_config_path", "use_mooncake_store_backend")],
)  # fmt: skip
def test_doctor_notices_a_store_that_is_not_used(
    shared: Shared, monkeypatch: pytest.MonkeyPatch, key: str, switch: str
) -> None:
    """A store that is given but not enabled is a finding that names the missing key."""
    monkeypatch.delenv("FLEXKV_REMOTE_CACHE_PATH")
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    assert "remote tier" not in json.loads(result.stdout)
    shared.set(f"FLEXKV_{key.upper()}", "file:///mnt/kv")
    result = RUNNER.invoke(commands, ["doctor", "--json"])
    finding = json.loads(result.stdout)["remote tier"]
    assert (result.exit_code, finding["fatal"], finding["good"]) == (0, False, False)
    assert finding["found"] == f"off, though {key} is given"
    assert finding["advice"] == f"set {switch} to use it"


class Failing:
    """A store that keeps what is put, and fails its reads and deletions."""

    kind = where = "failing"

    def __init__(self, cancels: bool) -> None:
        self.cancels, self.objects = cancels, set[str]()
        self.deleted: list[str] = []

    async def put(self, name: str, buffers: Any) -> bool:
        """Store an object; be cancelled afterwards if wanted."""
        self.objects.add(name)
        if self.cancels:
            raise asyncio.CancelledError
        return True

    async def read(self, name: str) -> bytes:
        """Fail."""
        raise RemoteError("failing", "get", "its own error")

    async def delete(self, name: str) -> None:
        """Fail, and remember what was to be deleted."""
        self.deleted.append(name)
        raise RemoteError("failing", "delete", "another error")


@pytest.mark.parametrize("cancels", [False, True])
def test_a_trial_that_fails_deletes_its_object(cancels: bool) -> None:
    """A trial's object is deleted also after an interrupted put; its first error is reported."""
    store = Failing(cancels)
    with pytest.raises((RemoteError, asyncio.CancelledError)) as caught:
        asyncio.run(round_trip(store, 4096))  # type: ignore[arg-type]
    assert set(store.deleted) == store.objects
    assert cancels or "its own error" in str(caught.value)

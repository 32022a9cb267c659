"""`flexkv remote`: commands that inspect, verify, collect or clear pools of the remote tier."""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import suppress
from typing import Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from flexkv.cli.remote_store import Session, chosen_pools, found_pools, run
from flexkv.common.config import CacheConfig
from flexkv.common.errors import RemoteError
from flexkv.common.terms import BlockKey
from flexkv.io.remote.names import SHARDS, Pool
from flexkv.io.remote.offline import FoundPool, FoundPools, SpanProver, base_of, fault_of
from flexkv.io.remote.until import Until
from flexkv.settings import load_settings
from flexkv.tiers.remote_gc.lease import LEASE_S, Lease, numbers_in
from flexkv.tiers.remote_gc.once import Collected, collect, shards_of
from flexkv.tiers.remote_gc.removal import Removal
from flexkv.tiers.remote_gc.rules import Limits
from flexkv.tiers.remote_gc.turns import REQUEST_S, Pacer, side_by_side

remote = typer.Typer(
    no_args_is_help=True,
    help="Inspect, verify, collect or clear the remote tier, which engines may use meanwhile.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WantedPool = Annotated[
    str, typer.Option("--pool", help="A pool's name, or how it begins; all pools if not given.")
]
FAULTS_SHOWN = 20
SHOWN_OF_NAME = 8
"""Characters of a pool's name in tables, which have to fit into a terminal; JSON has all."""
NO_POOL = "the store has no pool"
AT_ONCE, READS_PER_S = 8, 1e6
DAY_S = 24 * 3600.0


@remote.command("ls")
def list_pools(as_json: AsJson = False) -> None:
    """List the pools of the store: their model, size and age."""
    cache = load_settings().cache_config

    async def work(session: Session) -> list[dict[str, Any]]:
        found = await found_pools(session)
        there = [each for _, each in sorted(found.pools.items()) if each.pool or each.spans]
        now_s = await _store_time_s(session, there)
        return [_figures(each, found, now_s) for each in there]

    pools = run(cache, work, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(pools, indent=2))
        return
    if not pools:
        typer.echo(NO_POOL)
        return
    names = [name.replace("_", " ") for name in pools[0]]
    table = Table(
        *names, title="pools of the remote tier", box=box.SIMPLE_HEAD, pad_edge=False, padding=0
    )
    for pool in pools:
        name, *others = pool.values()
        table.add_row(name[:SHOWN_OF_NAME], *map(str, others))
    Console().print(table)


async def _store_time_s(session: Session, pools: list[FoundPool]) -> float:
    """Return the store's time; this machine's if nothing may be written to the store."""
    described = [each.pool for each in pools if each.pool is not None]
    if described:
        lease = Lease(session.requests)
        with suppress(RemoteError):
            await lease.read_clock(described[0])
            return lease.clock.early_s()
    return time.time()


def _figures(each: FoundPool, found: FoundPools, now_s: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"pool": each.name, "model": "?", "generation": "?"}
    if each.pool is not None:
        description = each.pool.description
        latest = found.latest(each)
        older = "" if description.generation == latest else f" (latest: {latest})"
        figures["model"] = description.block_identity.get("model_id") or "(not named)"
        figures["generation"] = f"{description.generation}{older}"
    oldest_s, newest_s = (
        (now_s - each.oldest_s, now_s - each.newest_s) if each.spans else (0.0, 0.0)
    )
    return {
        **figures,
        "spans": each.spans,
        "blocks": each.blocks,
        "gb": round(each.nbytes / 1e9, 3),
        "oldest_days": round(max(0.0, oldest_s) / DAY_S, 3),
        "newest_days": round(max(0.0, newest_s) / DAY_S, 3),
        "gc": "yes" if now_s - each.leased_s <= LEASE_S else "no",
    }


@remote.command()
def verify(
    wanted: WantedPool = "",
    sample: Annotated[
        float, typer.Option(help="The part of the spans to read, evenly chosen.", min=0, max=1)
    ] = 1.0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete wrong objects, so that they are stored anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read spans and prove that they are what was stored; the exit status is 1 if one is not."""
    cache = load_settings().cache_config
    begin_s = time.monotonic()

    async def work(session: Session) -> _Verified:
        verified = _Verified([])
        for _, pool in chosen_pools(await found_pools(session), wanted):
            verified += await _Verifier(session, pool, sample, repair).run()
        return verified

    result = run(cache, work, quiet=as_json)
    seconds = max(time.monotonic() - begin_s, 1e-9)
    figures = {
        "spans read": result.read,
        "MB/s": round(result.nbytes / 1e6 / seconds, 1),
        "wrong": len(result.faults),
        "deleted": result.deleted,
        "could not be read": result.failed,
        "wrong objects": result.faults[:FAULTS_SHOWN],
    }
    _show(figures, "verified", as_json)
    if result.faults or result.failed:
        raise typer.Exit(1)


class _Verified(NamedTuple):
    """What a verification has found."""

    faults: list[str]
    read: int = 0
    nbytes: int = 0
    deleted: int = 0
    failed: int = 0

    def __add__(self, other: _Verified) -> _Verified:  # type: ignore[override]
        both = zip(self[1:], other[1:], strict=True)
        return _Verified(self.faults + other.faults, *(a + b for a, b in both))


class _Verifier:
    """Reads spans of one pool, some side by side."""

    def __init__(self, session: Session, pool: Pool, sample: float, repair: bool) -> None:
        self._session, self._pool = session, pool
        self._sample, self._repair = sample, repair
        self._prover = SpanProver(pool.description)
        self._result = _Verified([])

    async def run(self) -> _Verified:
        """Return what was found."""
        session, pool = self._session, self._pool
        try:
            bar = session.progress.add_task(f"spans of {pool.name[:8]}", total=0)
            for shard in range(SHARDS):
                async for page in session.requests.pages(pool.shard(shard), REQUEST_S):
                    keys = deque[BlockKey]()
                    for each in page:
                        key = pool.span_key(each.name)
                        if key is not None and self._is_sampled(key):
                            keys.append(key)
                    total = (session.progress.tasks[bar].total or 0) + len(keys)
                    session.progress.update(bar, total=total)
                    await side_by_side(
                        session.spawn, AT_ONCE, keys, Pacer(READS_PER_S),
                        lambda key, until: self._verify(key, until, bar),
                    )  # fmt: skip
            return self._result
        finally:
            self._prover.close()

    def _is_sampled(self, key: BlockKey) -> bool:
        return int.from_bytes(key[8:12], "little") < self._sample * 2**32

    async def _verify(self, key: BlockKey, until: Until, bar: Any) -> None:
        requests, name = self._session.requests, self._pool.object_name(key)
        try:
            nbytes, fault, is_proved = await fault_of(requests, self._prover, name, key, until)
            deleted = bool(fault) and is_proved and self._repair
            if deleted:
                await requests.delete(name, until)
        except FileNotFoundError:
            return  # it was deleted meanwhile
        except RemoteError:
            self._result += _Verified([], failed=1)
            return
        finally:
            self._session.progress.advance(bar)
        faults = [f"{name}: {fault}"] if fault else []
        self._result += _Verified(faults, 1, nbytes, int(deleted))


@remote.command()
def gc(
    wanted: WantedPool = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Collect once: delete what is over num_remote_blocks or older than remote_ttl_s.

    Running engines do that by themselves. The exit status is 1 if one of them is collecting.
    """
    cache = load_settings().cache_config

    async def work(session: Session) -> dict[str, Any]:
        pools = chosen_pools(await found_pools(session), wanted)
        return {pool.name: await _collected(session, cache, pool, dry_run) for _, pool in pools}

    results = run(cache, work, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    elif not results:
        typer.echo(NO_POOL)
    else:
        for name, figures in results.items():
            _show(figures, f"pool {name[:SHOWN_OF_NAME]}", as_json=False)
    if any("refused" in figures for figures in results.values()):
        raise typer.Exit(1)


async def _collected(
    session: Session, cache: CacheConfig, pool: Pool, dry_run: bool
) -> dict[str, Any]:
    """Collect one pool, and return what was done."""
    budget, size = cache.num_remote_blocks, pool.description.span_blocks
    limits = Limits(None if budget is None else max(1, budget // size), cache.remote_ttl_s)
    lease = Lease(session.requests)
    if dry_run:
        await lease.read_clock(pool)
    elif not await lease.hold(pool):
        return {"refused": "an engine collects this pool, or did until a few minutes ago"}
    removal = Removal(session.requests, cache.remote_delete_per_s, lambda key: None)
    removal.spawn = session.spawn
    bar = session.progress.add_task(f"spans of {pool.name[:8]} listed", total=None)
    try:
        listings = await shards_of(
            session.requests, pool, session.spawn, lambda n: session.progress.advance(bar, n)
        )
        done: Collected = await collect(removal, lease, pool, limits, listings, dry_run)
    finally:
        await lease.release()
    return done._asdict() | {
        "oldest_s": round(done.oldest_s, 1),
        "spared": removal.counting["spared"],
        "failed": removal.counting["failed"],
    }


@remote.command()
def clear(
    wanted: WantedPool = "",
    delete: Annotated[
        bool, typer.Option("--delete", help="Also delete all older objects now.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Begin a new generation of pools: engines that start from now on find nothing.

    Engines that run go on with the generation that they use, until they are restarted or cleared.
    Older generations are deleted by engines of the latest, or now with --delete.
    """
    cache = load_settings().cache_config
    bases = run(cache, lambda session: _bases(session, wanted))
    if not bases:
        typer.echo(NO_POOL)
        return
    spans = sum(found.spans for found, _ in bases)
    pools = "1 pool" if len(bases) == 1 else f"{len(bases)} pools"
    what = f"the {spans} spans of {pools} at {' '.join(cache.remote_cache_path)}"
    if not yes:
        how = ", and delete" if delete else " without"
        typer.confirm(f"Begin a new generation{how} {what}?", abort=True)
    deleted = run(cache, lambda session: _cleared(session, cache, bases, delete))
    ends = f"deleted {deleted} spans" if delete else f"engines will delete the {spans} older spans"
    typer.echo(f"began a new generation; {ends}")


Bases = list[tuple[FoundPool, Pool]]


async def _bases(session: Session, wanted: str) -> Bases:
    """Return the pools to clear: each with what was found of it."""
    return chosen_pools(await found_pools(session), wanted)


async def _cleared(session: Session, cache: CacheConfig, pools: Bases, delete: bool) -> int:
    """Begin new generations, and delete the pools' spans if wanted; return how many."""
    for base in {base_of(pool).name: base_of(pool) for _, pool in pools}.values():
        latest = max(await numbers_in(session.requests, base.generations), default=0)
        number = latest + 1
        while not await session.requests.store.put(f"{base.generations}{number}", [b"\n"]):
            number += 1  # another one has begun it meanwhile
    if not delete:
        return 0
    removal = Removal(session.requests, cache.remote_delete_per_s, lambda key: None)
    removal.spawn = session.spawn
    bar = session.progress.add_task("spans deleted", total=sum(each.spans for each, _ in pools))
    for _, pool in pools:
        for shard in range(SHARDS):
            async for page in session.requests.pages(pool.shard(shard), REQUEST_S):
                await removal.garbage(deque(each.name for each in page))
                session.progress.advance(bar, len(page))
    return removal.counting["garbage"]


def _show(figures: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    table = Table("what", "value", title=title)
    for name, value in figures.items():
        text = "\n".join(value) if isinstance(value, list) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)

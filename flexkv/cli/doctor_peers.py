"""The checks of sharing between nodes by `flexkv doctor`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from flexkv.cli.doctor_tiers import INSTALL, Finding
from flexkv.cli.remote_store import run_until_signal
from flexkv.cluster import tcp
from flexkv.cluster.listener import BACKLOG
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import Command
from flexkv.cluster.store import ClusterStoreError
from flexkv.common.config import CacheConfig
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.io.peer.sockets import SocketRing
from flexkv.mover.engine_config import load_engine_config
from flexkv.mover.installed import check_installed

ROUND_TRIPS = 5
SLOW_MS = 50.0
VERSION_MIN = (6, 2)
"""The first version that has `ZADD GT` and `SET … GET`."""
KEEPS = "noeviction"
"""The policy of a Redis that refuses to store more, rather than forget keys by itself."""
GIVEN = "redis_host", "local_ip", "mooncake_config_path", "cluster_secret"
"""Keys that nobody gives who shares nothing."""


class _Told(NamedTuple):
    """What a Redis has told of itself, and how soon it answered at best."""

    round_trip_ms: float
    facts: dict[str, str]


def peers(cache: CacheConfig) -> Iterator[Finding]:
    """Yield what sharing between nodes needs: sockets, an address, a secret, Redis."""
    name = "sharing between nodes"
    if not cache.has_peers:
        for key in sorted(cache.model_fields_set.intersection(GIVEN)):
            yield Finding(name, f"off, though {key} is given", False, "set enable_p2p_cpu")
        return
    yield _ring()
    yield _address(cache)
    yield _secret(cache)
    if cache.mooncake_config_path:
        yield _mooncake(cache)
    yield from _redis(cache)


def _ring() -> Finding:
    name = "sharing: sockets"
    try:
        SocketRing([bytearray(4096)], 8).close()
    except OSError as error:
        found = f"io_uring is refused: {error.strerror}"
        advice = "nothing is shared without it: set sysctl kernel.io_uring_disabled=0"
        return Finding(name, found, False, advice, fatal=True)
    return Finding(name, "io_uring reads and writes them", True)


def _address(cache: CacheConfig) -> Finding:
    """Return whether this node can listen where others are to reach it."""
    name = "sharing: address"
    try:
        tcp.listening(cache.local_ip, cache.p2p_port, BACKLOG).close()
    except ConfigError as error:
        advice = "set it to the address at which other nodes reach this one"
        if error.field == "p2p_port":
            advice = "set another p2p_port; or is an engine running that uses it already?"
        return Finding(name, str(error), False, advice, fatal=True)
    port = f"port {cache.p2p_port}" if cache.p2p_port else "any free port"
    advice = ""
    if ip_address(cache.local_ip).is_loopback:
        advice = "only nodes of this machine reach it: set local_ip where there are others"
    return Finding(name, f"{cache.local_ip} is this machine's; {port}", True, advice)


def _secret(cache: CacheConfig) -> Finding:
    """Return which secret the nodes prove to each other, and never the secret itself."""
    name = "sharing: secret"
    if cache.cluster_secret.get_secret_value():
        return Finding(name, "cluster_secret is set", True)
    keys = [
        key for key in ("key_secret", "redis_password") if getattr(cache, key).get_secret_value()
    ]
    if keys:
        return Finding(name, f"derived from {' and '.join(keys)}", True)
    found = "none is set: every user of this machine may read the cache"
    return Finding(name, found, False, "set cluster_secret")


def _mooncake(cache: CacheConfig) -> Finding:
    """Return whether Mooncake's configuration file is right, and Mooncake can be loaded."""
    name = "sharing: Mooncake"
    try:
        config = load_engine_config(cache.mooncake_config_path, cache.p2p_trusted_network)
        check_installed("Mooncake's TransferEngine")
    except (ConfigError, BackendUnavailableError) as error:
        advice = "unset mooncake_config_path to move blocks over TCP without it"
        return Finding(name, str(error), False, advice, fatal=True)
    return Finding(name, f"can be loaded; {config.protocol} at {config.engine_ip}", True)


def _redis(cache: CacheConfig) -> Iterator[Finding]:
    name = "Redis"
    try:
        told = run_until_signal(_ask(cache))
    except BackendUnavailableError as error:
        yield Finding(name, str(error), False, INSTALL, fatal=True)
        return
    except ClusterStoreError as error:
        advice = "see redis_host, redis_port and redis_password"
        yield Finding(name, str(error), False, advice, fatal=True)
        return
    facts, where = told.facts, f"{cache.redis_host}:{cache.redis_port}"
    product, version = "redis", facts.get("redis_version", "?")
    if "valkey_version" in facts:
        product, version = "valkey", facts["valkey_version"]
    found = f"{product} {version} at {where}, {told.round_trip_ms:.1f} ms a round trip"
    numbers = tuple(
        int(each) for each in facts.get("redis_version", "").split(".") if each.isdigit()
    )
    if numbers < VERSION_MIN:
        yield Finding(name, found, False, "use 6.2 or later", fatal=True)
    elif told.round_trip_ms > SLOW_MS:
        yield Finding(name, found, False, "nodes know later what others have: use a nearer one")
    else:
        yield Finding(name, found, True)
    yield _memory(facts)


def _memory(facts: dict[str, str]) -> Finding:
    """Return whether Redis has a bound for its memory, and what it does when that is reached."""
    policy, bound = facts.get("maxmemory_policy", "?"), int(facts.get("maxmemory", "0"))
    used = f"{int(facts.get('used_memory', '0')) / 1e6:.0f} MB used"
    if not bound:
        return Finding("Redis memory", f"{used}, no bound", True)
    found = f"{used} of {bound / 1e6:.0f} MB, {policy}"
    good = policy in (KEEPS, "?")
    advice = "" if good else f"it may forget which nodes there are: set maxmemory-policy {KEEPS}"
    return Finding("Redis memory", found, good, advice)


async def _ask(cache: CacheConfig) -> _Told:
    """Ask a Redis what it is, and whether it takes what nodes write.

    Raises:
        ClusterStoreError: it does not answer, or refuses a command.
        BackendUnavailableError: the client is not installed.
    """
    redis = RedisCommands(
        cache.redis_host, cache.redis_port, cache.redis_password.get_secret_value()
    )
    try:
        texts = await redis.run([("INFO", "server"), ("INFO", "memory")])
        took_s = []
        for _ in range(ROUND_TRIPS):
            begin_s = time.perf_counter()
            await redis.run([("PING",)])
            took_s.append(time.perf_counter() - begin_s)
        await redis.run(_trials(f"flexkv:{{doctor-{secrets.token_hex(8)}}}"))
    finally:
        await redis.close()
    lines = b"\n".join(texts).decode(errors="replace").splitlines()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    return _Told(1000 * min(took_s), facts)


def _trials(base: str) -> Sequence[Command]:
    """Return commands as nodes use them, on keys of their own that are deleted at the end."""
    node, log, generation = (f"{base}:{name}" for name in ("node", "log", "generation"))
    return (
        ("SET", node, b"a trial", "PX", 10_000, "NX"),
        ("XADD", log, "MAXLEN", "~", 10, "*", b"e", b"a trial"),
        ("PEXPIRE", log, 10_000),
        ("XREAD", "COUNT", 1, "STREAMS", log, "0-0"),
        ("ZADD", generation, "GT", 1, b"now"),
        ("PEXPIRE", generation, 10_000),
        ("ZMSCORE", generation, b"now"),
        ("MEMORY", "USAGE", log),
        ("DEL", node, log, generation),
    )

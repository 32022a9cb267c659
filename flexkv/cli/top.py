"""`flexkv top` and `flexkv stats`: tables of what a metrics endpoint serves."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, TypeAlias

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from flexkv.cli.options import finite
from flexkv.common.errors import ConfigError

Samples: TypeAlias = Mapping[str, Mapping[tuple[str, ...], float]]
"""Values by metric, then by the values of its labels in the order of the labels' names."""

Url = Annotated[str, typer.Option(help="URL of the metrics (see enable_metrics).")]
URL = "http://127.0.0.1:8080/metrics"
ANSWER_BYTES_MAX = 64 << 20
OF_ENGINE = ("engine", "instance")
"""Labels that every sample of an engine has; they are left out of `Samples`."""


def scrape(url: str) -> Samples:
    """Return the samples of a metrics endpoint.

    Raises:
        ConfigError: nothing answers there, or something other than FlexKV.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError("url", url, "must begin with http:// or https://")
    try:
        # Ignore proxies of the environment: one could not reach an engine on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5) as answer:
            text = answer.read(ANSWER_BYTES_MAX).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError, OverflowError, LookupError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        said = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        why = (
            f"there are no metrics ({said}): is a server or engine running, with enable_metrics "
            "or a MetricsServer, on this port?"
        )
        raise ConfigError("url", url, why) from error
    samples: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in families:
        for sample in family.samples:
            of = sorted(sample.labels.items())
            labels = tuple(value for name, value in of if name not in OF_ENGINE)
            samples[sample.name][labels] = sample.value
    if "flexkv_up" not in samples:
        raise ConfigError("url", url, "does not serve FlexKV's metrics")
    return samples


def stats(
    url: Url = URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print the statistics of a running server or engine, once."""
    samples = scrape(url)
    if as_json:
        told = {
            name: {",".join(labels): value for labels, value in of.items()}
            for name, of in samples.items()
            if not name.endswith(("_bucket", "_created"))
        }
        typer.echo(json.dumps(told, indent=2))
    else:
        Console().print(screen(samples, None, 0.0))


def top(
    url: Url = URL,
    interval: Annotated[
        float, typer.Option(min=0.1, callback=finite, help="Seconds from one update to the next.")
    ] = 2.0,
    count: Annotated[int, typer.Option(min=0, help="Updates to show; 0 = until interrupted.")] = 0,
) -> None:
    """Watch a running server or engine: rates, hits, tiers, queues, the slowest request."""
    before, at_s = scrape(url), time.monotonic()
    looks = 0
    console = Console()
    with Live(screen(before, None, 0.0), console=console, auto_refresh=False) as live:
        while not count or looks < count:
            time.sleep(interval)
            now, now_s = scrape(url), time.monotonic()
            live.update(screen(now, before, now_s - at_s), refresh=True)
            before, at_s, looks = now, now_s, looks + 1
    if not console.is_terminal:
        console.print()


def screen(now: Samples, before: Samples | None, seconds: float) -> Group:
    """Return the tables: rates since `before`, or totals if that is None.

    A table without rows is left out. The first one keeps its title, which says how busy the engine
    is.
    """
    makers = _requests, _tiers, _stores, _peers, _routes
    requests, *others = (make(now, before, seconds) for make in makers)
    return Group(requests if requests.row_count else str(requests.title),
                 *(table for table in others if table.row_count))  # fmt: skip


def _per_s(
    name: str, labels: tuple[str, ...], now: Samples, before: Samples | None, seconds: float
) -> str:
    """Return a counter's rate since `before`, or its value if that is None."""
    value = now.get(name, {}).get(labels, 0.0)
    if before is None or not seconds:
        return f"{value:,.0f}"
    return f"{(value - before.get(name, {}).get(labels, 0.0)) / seconds:,.1f} /s"


def _requests(now: Samples, before: Samples | None, seconds: float) -> Table:
    running, waiting = (
        now.get(f"flexkv_requests_{what}", {}).get((), 0) for what in ("running", "waiting")
    )
    up = "up" if now["flexkv_up"].get(()) else "CLOSED"
    title = f"FlexKV {up}: {running:.0f} requests under way, {waiting:.0f} waiting"
    table = Table("request", "answered", "mean ms", "slowest ms (id)", title=title)
    slowest = now.get("flexkv_slowest_request_seconds", {})
    ids = now.get("flexkv_slowest_request_id", {})
    for labels in sorted(now.get("flexkv_request_seconds_count", {})):
        table.add_row(
            labels[0],
            _per_s("flexkv_request_seconds_count", labels, now, before, seconds),
            _mean_ms("flexkv_request_seconds", labels, now, before),
            f"{1e3 * slowest[labels]:,.2f} ({ids[labels]:.0f})" if labels in slowest else "",
        )
    return table


def _mean_ms(name: str, labels: tuple[str, ...], now: Samples, before: Samples | None) -> str:
    total, count = (
        now.get(f"{name}_{part}", {}).get(labels, 0.0)
        - (before or {}).get(f"{name}_{part}", {}).get(labels, 0.0)
        for part in ("sum", "count")
    )
    return f"{1e3 * total / count:.2f}" if count else ""


def _tiers(now: Samples, before: Samples | None, seconds: float) -> Table:
    table = Table("tier", "used", "pinned", "hits", "evicted", "reads", "writes")
    blocks = now.get("flexkv_tier_blocks", {})
    for (tier,), capacity in sorted(now.get("flexkv_tier_capacity_blocks", {}).items()):
        used = capacity - blocks.get(("free", tier), 0.0)
        ups = (now["flexkv_tier_up"].get((direction, tier)) for direction in ("reads", "writes"))
        table.add_row(
            tier,
            f"{used:,.0f} of {capacity:,.0f} ({100 * used / max(1, capacity):.0f} %)",
            f"{blocks.get(('pinned', tier), 0.0):,.0f}",
            _per_s("flexkv_hit_blocks_total", (tier,), now, before, seconds),
            _per_s("flexkv_evicted_blocks_total", (tier,), now, before, seconds),
            *("up" if up else "[bold red]down" for up in ups),
        )
    return table


def _stores(now: Samples, before: Samples | None, seconds: float) -> Table:
    table = Table(
        "store", "state", "owed blocks", "MB in flight", "known spans", "gets", "puts", "lists",
        "failed",
    )  # fmt: skip
    in_flight = now.get("flexkv_in_flight_bytes", {})
    for (tier,), joined in sorted(now.get("flexkv_store_joined", {}).items()):
        bytes_in_flight = (in_flight.get((tier, way), 0.0) for way in ("inbound", "outbound"))
        failed = now.get("flexkv_store_failures_total", {}).items()
        table.add_row(
            tier,
            _state(tier, bool(joined), now),
            f"{now.get('flexkv_write_behind_blocks', {}).get(('owed', tier), 0.0):,.0f}",
            " in, ".join(f"{size / 1e6:,.0f}" for size in bytes_in_flight) + " out",
            f"{now.get('flexkv_store_known_spans', {}).get((tier,), 0.0):,.0f}",
            *(
                _per_s("flexkv_store_requests_total", (kind, tier), now, before, seconds)
                for kind in ("get", "put", "list")
            ),
            f"{sum(count for (_, of), count in failed if of == tier):,.0f}",
        )
    return table


def _state(tier: str, joined: bool, now: Samples) -> str:
    """Return whether a store is in use, and which directions are not."""
    if not joined:
        return "[bold red]not joined"
    ups = now.get("flexkv_tier_up", {})
    down = [way for way in ("reads", "writes") if not ups.get((way, tier), 1.0)]
    if down:
        return f"[bold red]{', '.join(down)} down"
    is_refused = now.get("flexkv_store_refused", {}).get((tier,), 0.0)
    return "[bold red]collection refused" if is_refused else "joined"


def _peers(now: Samples, before: Samples | None, seconds: float) -> Table:
    table = Table(
        "peers", "shares", "Redis", "spans", "MB read", "MB lent", "granted", "busy", "failed",
    )  # fmt: skip
    nodes = now.get("flexkv_cluster_peers")
    if not nodes:
        return table
    down = nodes["down",]
    apart, redis = (now[f"flexkv_cluster_{what}"][()] for what in ("apart", "redis_up"))
    failures = now["flexkv_peer_failures_total"]
    table.add_row(
        f"{nodes['up',]:,.0f}" + (f" [bold red]and {down:,.0f} down" if down else ""),
        "[bold red]apart" if apart else "yes",
        "up" if redis else "[bold red]down",
        f"{now['flexkv_cluster_known_spans'][()]:,.0f}",
        _megabytes((), now, before, seconds, "flexkv_peer_read_bytes_total"),
        _megabytes((), now, before, seconds, "flexkv_cluster_lent_bytes_total"),
        _per_s("flexkv_cluster_wants_total", ("granted",), now, before, seconds),
        _per_s("flexkv_peer_failures_total", ("busy",), now, before, seconds),
        f"{sum(failures[why,] for why in ('failed', 'missing', 'wrong')):,.0f}",
    )
    return table


def _routes(now: Samples, before: Samples | None, seconds: float) -> Table:
    table = Table("route", "MB", "transfers", "mean ms queued", "mean ms on device", "failed")
    for labels in sorted(now.get("flexkv_transfers_total", {})):
        table.add_row(
            labels[0],
            _megabytes(labels, now, before, seconds),
            _per_s("flexkv_transfers_total", labels, now, before, seconds),
            _mean_ms("flexkv_transfer_queue_seconds", labels, now, before),
            _mean_ms("flexkv_transfer_seconds", labels, now, before),
            f"{now.get('flexkv_transfer_failures_total', {}).get(labels, 0.0):,.0f}",
        )
    return table


def _megabytes(
    labels: tuple[str, ...],
    now: Samples,
    before: Samples | None,
    seconds: float,
    name: str = "flexkv_transfer_bytes_total",
) -> str:
    value = now.get(name, {}).get(labels, 0.0)
    if before is None or not seconds:
        return f"{value / 1e6:,.0f}"
    return f"{(value - before.get(name, {}).get(labels, 0.0)) / 1e6 / seconds:,.0f} /s"

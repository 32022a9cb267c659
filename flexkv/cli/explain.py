"""`flexkv explain`: a drawing of the plan that a request would run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flexkv.common.config_keys import BLOCKS_MAX
from flexkv.common.request import Operation
from flexkv.common.terms import Route, Tier
from flexkv.graph.draft import LOAD, STORE, PlanLimits
from flexkv.graph.explain import hypothetical


class Kind(StrEnum):
    """The kind of a request."""

    get = "get"
    put = "put"
    prefetch = "prefetch"


def explain(
    kind: Annotated[Kind, typer.Argument(help="Kind of the request.")],
    host: Annotated[
        int,
        typer.Option(min=0, max=BLOCKS_MAX, help="Blocks that are in host memory."),
    ] = 0,
    disk: Annotated[
        int, typer.Option(min=0, max=BLOCKS_MAX, help="Blocks that are on SSD only.")
    ] = 0,
    new: Annotated[
        int, typer.Option(min=0, max=BLOCKS_MAX, help="Blocks that are in no tier yet (put).")
    ] = 0,
    chunk_blocks: Annotated[
        int, typer.Option(min=1, max=BLOCKS_MAX, help="Most blocks that are moved together.")
    ] = 8,
    dot: Annotated[bool, typer.Option("--dot", help="Print Graphviz DOT.")] = False,
) -> None:
    """Draw the transfers of a request, given where its blocks are."""
    read, write = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)
    legs: dict[Kind, dict[tuple[Route, ...], int]] = {
        Kind.get: {(LOAD,): host, (read, LOAD): disk},
        Kind.put: {(STORE, write): new, (write,): host},
        Kind.prefetch: {(read,): disk},
    }
    note = f"{kind} of {host} blocks in host, {disk} on disk, {new} new"
    told = hypothetical(
        Operation[kind.upper()], legs[kind], PlanLimits(chunk_blocks, 1 << 40), note
    )
    typer.echo(told.dot() if dot else str(told))

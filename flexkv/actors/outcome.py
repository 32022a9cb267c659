"""What the caller of a request is told, from the states in which its ops ended."""

from __future__ import annotations

import numpy as np

from flexkv.common.errors import CapacityError, ClearedError, CorruptBlockError, FlexKVError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request, TokenMask
from flexkv.graph.ops import OpState
from flexkv.graph.planner import Planned
from flexkv.graph.run import Run


def response_of(request: Request, planned: Planned, run: Run) -> KVResponse:
    """Give the response of a run whose answering ops are all over."""
    first = request.span.first_block
    if request.operation is Operation.GET and not run.errors and not run.cancelled:
        # The common case: everything that was planned has been loaded.
        count = planned.found.last - first
        mask = np.zeros(request.token_count, np.bool_)
        per_block = request.tokens_per_block
        mask[first * per_block : (first + count) * per_block] = True
        status = _status(request, planned, run, count > 0)
        return KVResponse(status, request.request_id, mask, planned.shortfall)
    moved = _moved_blocks(request, planned, run)
    error: FlexKVError | None = run.errors[0] if run.errors else planned.shortfall
    return KVResponse(
        _status(request, planned, run, bool(moved.any())),
        request.request_id,
        _tokens_of(request, moved),
        error,
    )


def _status(request: Request, planned: Planned, run: Run, moved: bool) -> KVResponseStatus:
    if run.cancelled or isinstance(planned.shortfall, ClearedError):
        return KVResponseStatus.CANCELLED
    if moved:
        return KVResponseStatus.SUCCESS
    if run.errors and all(isinstance(error, CorruptBlockError) for error in run.errors):
        return KVResponseStatus.NOTFOUND  # what is not what it was is not there
    if run.errors:
        return KVResponseStatus.FAILED
    full = isinstance(planned.shortfall, CapacityError)
    if request.operation is Operation.PUT:
        # Without a shortfall everything was there already.
        return KVResponseStatus.UNREADY if full else KVResponseStatus.SUCCESS
    if planned.found.last == planned.found.first:
        return KVResponseStatus.UNREADY if full else KVResponseStatus.NOTFOUND
    return KVResponseStatus.SUCCESS


def _moved_blocks(request: Request, planned: Planned, run: Run) -> TokenMask:
    """Return bool[span blocks]: those whose answering op is DONE, up to the first one that is not.

    Blocks behind one that did not come are dropped with it, since no request could reach them.
    What a get brings is an unbroken run, because each block that it found has an answering op.
    """
    first = request.span.first_block
    moved = np.zeros(request.span.last_block - first, np.bool_)
    if run.cancelled:
        return moved
    plan, last = planned.plan, request.span.last_block
    for op in plan.template.ops:
        if not op.answers or op.route is None:
            continue
        begin, end = plan.bounds(op)
        positions = plan.fills[op.leg].positions.part(begin, end)
        if run.states[op.index] is not OpState.DONE:
            last = min(last, positions.first)
        elif positions.places is None:
            begin = positions.first - first
            moved[begin : begin + positions.block_count] = True
        else:
            moved[positions.places - first] = True
    if last < request.span.last_block:
        moved[last - first :] = False
    return moved


def _tokens_of(request: Request, moved: TokenMask) -> TokenMask:
    """Spread bool[span blocks] over bool[tokens]."""
    mask = np.zeros(request.token_count, np.bool_)
    if moved.size:
        span = request.span
        tokens_per_block = request.tokens_per_block
        begin = span.first_block * tokens_per_block
        mask[begin : begin + moved.size * tokens_per_block] = np.repeat(moved, tokens_per_block)
    return mask

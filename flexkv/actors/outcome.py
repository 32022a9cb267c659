"""Makes the response to a request from the states in which its ops ended."""

from __future__ import annotations

import numpy as np

from flexkv.common.errors import CapacityError, ClearedError, FlexKVError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request, TokenMask
from flexkv.common.terms import Tier
from flexkv.graph.planner import Planned
from flexkv.graph.run import Run


def response_of(request: Request, planned: Planned, run: Run) -> KVResponse:
    """Return the response of a run whose answering ops are all over.

    A load of several KV groups that lacks any block counts as having moved nothing: a prefix is of
    no use without what it needs of each group. A prefetch that lacks none counts as having moved
    its whole prefix, even if it has brought only leaves.
    """
    first, is_get = request.span.first_block, request.operation is Operation.GET
    if (is_get or planned.is_whole) and not run.errors and not run.cancelled:
        # The common case: everything that was planned has been loaded.
        count = planned.found.last - first
        mask = np.zeros(request.token_count, np.bool_)
        per_block = request.tokens_per_block
        mask[first * per_block : (first + count) * per_block] = True
        status = _status(request, planned, run, count > 0)
        return KVResponse(status, request.request_id, mask, planned.shortfall)
    if planned.is_whole and (run.errors or run.cancelled):
        moved = np.zeros(request.span.last_block - first, np.bool_)
    else:
        moved = _moved_blocks(request, planned, run)
    error: FlexKVError | None = _error_of(run) if run.errors else planned.shortfall
    return KVResponse(
        _status(request, planned, run, bool(moved.any())),
        request.request_id,
        _tokens_of(request, moved),
        error,
    )


def _error_of(run: Run) -> TransferError:
    """Return the error to respond with: if the device has failed, its error, else the first one."""
    routes = {number: run.template.ops[number].route for number in run.failed}
    of_device = [number for number, route in routes.items() if route and route.outer is Tier.DEVICE]
    return run.failed[of_device[0]] if of_device else run.errors[0]


def _status(request: Request, planned: Planned, run: Run, moved: bool) -> KVResponseStatus:
    if run.cancelled or isinstance(planned.shortfall, ClearedError):
        return KVResponseStatus.CANCELLED
    if moved:
        return KVResponseStatus.SUCCESS
    if run.errors and all(error.is_miss for error in run.errors):
        return KVResponseStatus.NOTFOUND
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
    """Return bool[span blocks]: the blocks that were moved, up to the first that was not.

    Blocks behind one that was not moved are dropped with it, since no request could reach them.
    What a get brings is an unbroken run, because each block that it found has an answering op. Of
    several KV groups, only the chain's blocks are counted.
    """
    first = request.span.first_block
    moved = np.zeros(request.span.last_block - first, np.bool_)
    if run.cancelled:
        return moved
    plan, last = planned.plan, request.span.last_block
    for op in plan.template.ops:
        if not op.answers or op.route is None or op.group:
            continue
        begin, end = plan.bounds(op)
        count = run.filled(op.index, end - begin)
        if count < end - begin:
            last = min(last, plan.fills[op.leg].positions.part(begin + count, end).first)
        positions = plan.fills[op.leg].positions.part(begin, begin + count)
        if positions.places is None:
            begin = positions.first - first
            moved[begin : begin + positions.block_count] = True
        else:
            moved[positions.places - first] = True
    if last < request.span.last_block:
        moved[last - first :] = False
    return moved


def _tokens_of(request: Request, moved: TokenMask) -> TokenMask:
    """Return a mask over the prompt, bool[tokens], for `moved`: bool[span blocks]."""
    mask = np.zeros(request.token_count, np.bool_)
    if moved.size:
        span = request.span
        tokens_per_block = request.tokens_per_block
        begin = span.first_block * tokens_per_block
        mask[begin : begin + moved.size * tokens_per_block] = np.repeat(moved, tokens_per_block)
    return mask

"""A port that wraps one that makes no checksums, and sums the blocks it brings to host memory."""

from __future__ import annotations

from collections.abc import Callable

from flexkv.common.errors import InvariantError
from flexkv.common.terms import Tier, Transfer
from flexkv.io.checksums.sums import Checksummer
from flexkv.io.ports import Completion, TransferPort


class SummedPort:
    """A transfer port whose transfers to the host end once their blocks are summed.

    Attributes:
        sums: uint64[host blocks], the sum of each.
    """

    def __init__(
        self,
        inner: TransferPort,
        checksummer: Checksummer,
        inner_keeps_sums: bool = False,
        block_bytes: int = 0,
    ) -> None:
        """Wrap a port; it and the checksummer are closed with this one.

        With `inner_keeps_sums` the inner port sums whole blocks itself, and only blocks that arrive
        layer by layer are summed here. `block_bytes` is what it moves for one block inbound.
        """
        self.sums = checksummer.sums
        self._has_summed = inner_keeps_sums
        self._inner, self._checksummer, self._block_bytes = inner, checksummer, block_bytes
        self._moving: dict[int, Transfer] = {}
        self._summing: dict[int, Transfer] = {}
        self._summing_inbound_bytes = 0

    @property
    def arrived_bytes(self) -> int:
        """Return the inbound bytes that have arrived and are being summed."""
        return self._inner.arrived_bytes + self._summing_inbound_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._inner.connect(wake)
        self._checksummer.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        self._inner.submit(transfer)
        if transfer.route.target is Tier.HOST and not (
            self._has_summed and transfer.layers is None
        ):
            self._moving[transfer.op_id] = transfer

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        if not self._moving and not self._summing:
            return self._inner.reap()
        ended = []
        for completion in self._inner.reap():
            transfer = self._moving.pop(completion.op_id, None)
            if transfer is None or completion.error is not None or not _is_whole(transfer):
                # Blocks without a checksum have not arrived.
                ended.append(completion._replace(filled=0) if completion.filled else completion)
                continue
            self._summing[transfer.op_id] = transfer
            self._count(transfer, 1)
            self._checksummer.submit(transfer.op_id, transfer.target_ids, urgent=True)
        for op_id in self._checksummer.reap():
            self._count(self._summing.pop(op_id), -1)
            ended.append(Completion(op_id, None))
        return ended

    def _count(self, transfer: Transfer, sign: int) -> None:
        if transfer.route.inbound:
            self._summing_inbound_bytes += sign * transfer.block_count * self._block_bytes

    def close(self) -> None:
        """Close both. Only legal with nothing in flight. Idempotent.

        Raises:
            InvariantError: transfers were in flight; their ends were not reported.
        """
        try:
            self._checksummer.close()
        finally:
            self._inner.close()
        if left := len(self._moving) + len(self._summing):
            raise InvariantError(f"summed port closed with {left} transfers unreaped")


def _is_whole(transfer: Transfer) -> bool:
    """Count a piece that ended, and return whether its transfer has now ended as a whole."""
    layers = transfer.layers
    if layers is None:
        return True
    layers.left[0] -= layers.last - layers.first
    return not layers.left[0]

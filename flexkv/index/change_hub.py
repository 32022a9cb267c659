"""Passes the changes of the index on to several readers.

    table ──one watch──▶ hub ──▶ reader (at most `limit` changes)  ──take──▶
                             ──▶ reader (at most `limit` changes)  ──take──▶

The table records for the hub alone. Whenever a reader takes, the hub takes from the table, and adds
the records to what each reader has not read yet; the readers share their memory. So a reader that
does not read costs the others nothing, and its unread records are bounded by its own limit.
"""

from __future__ import annotations

import numpy as np

from flexkv.index.recorder import RECORD, Change, ChangeRecorder, Records
from flexkv.index.residency import Residency


class ChangeHub:
    """The readers of an index's changes. While there are none, nothing is recorded.

    Attributes:
        recorder: that of the index. Only the hub may take from it.
    """

    def __init__(self, residency: Residency) -> None:
        """Begin without readers."""
        self.recorder: ChangeRecorder = residency.recorder
        self._readers: list[ChangeReader] = []
        self._limit = 0

    def reader(self, limit: int) -> ChangeReader:
        """Return a reader of all changes from now on; it has up to `limit` of them unread."""
        self._pass_on()
        reader = ChangeReader(self, limit)
        self._readers.append(reader)
        self._watch()
        return reader

    def _pass_on(self) -> None:
        """Add what the table has recorded to what each reader has not read."""
        if not self._readers:
            return
        records = self.recorder.take()
        if records is None or len(records):
            for reader in self._readers:
                reader._add(records)

    def _leave(self, reader: ChangeReader) -> None:
        if reader in self._readers:
            self._pass_on()
            self._readers.remove(reader)
            self._watch()

    def _watch(self) -> None:
        """Record as many changes as the reader with the highest limit may have unread."""
        limit = max([reader.limit for reader in self._readers], default=0)
        if limit != self._limit:
            self._limit = limit
            self.recorder.watch(limit)


class ChangeReader:
    """Reads each change once, unless it falls behind.

    Attributes:
        limit: how many changes may be unread. With one more all unread ones are lost.
    """

    def __init__(self, hub: ChangeHub, limit: int) -> None:
        """Begin with nothing unread; `ChangeHub.reader` makes readers."""
        assert limit > 0, limit
        self.limit = limit
        self._hub = hub
        self._unread: list[Records] = []
        self._count = 0
        self._lost = False

    def take(self) -> list[Change] | None:
        """Return the changes since the last call, oldest first.

        Return None if there were more than the limit: they are lost, and the next call returns
        those that come after this one.
        """
        records = self.take_records()
        return None if records is None else self._hub.recorder.decoded(records)

    def take_records(self) -> Records | None:
        """Return the same as `take`, as records."""
        self._hub._pass_on()
        lost, unread = self._lost, self._unread
        self._unread, self._count, self._lost = [], 0, False
        if lost:
            return None
        return unread[0] if len(unread) == 1 else np.concatenate([_NO_RECORDS, *unread])

    def close(self) -> None:
        """Read nothing any more; closing twice is allowed."""
        self._hub._leave(self)
        self._unread, self._count, self._lost = [], 0, False

    def _add(self, records: Records | None) -> None:
        if records is not None:
            self._count += len(records)
        if records is None or self._count > self.limit:
            self._lost = True
        if self._lost:
            self._unread.clear()
        elif records is not None:
            self._unread.append(records)


_NO_RECORDS = np.zeros(0, RECORD)

"""The journals of one SSD tier, which are written together on the ledger's thread.

Frames that cannot be written to a journal are kept, and written before its next ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexkv.common.errors import StorageError
from flexkv.io.ssd.files import Missing
from flexkv.io.ssd.journal import Journal, Live, cleared

KEPT_BYTES_MAX = 16 << 20
"""The most bytes kept for a journal that cannot be written; beyond, it is emptied."""


class Journals:
    """One journal for each directory. All calls block, and come from one thread unless noted."""

    def __init__(self, journals: Sequence[Journal]) -> None:
        """Take ownership of open journals."""
        self.each = tuple(journals)
        self._kept = [b"" for _ in journals]

    def __len__(self) -> int:
        return len(self.each)

    def lives(self) -> list[Live]:
        """Return what each journal said when it was opened."""
        return [journal.live for journal in self.each]

    def forget_lives(self) -> None:
        """Drop what the journals said when they were opened."""
        for journal in self.each:
            journal.forget_live()

    def append(self, frames: Sequence[bytes], clears: bool = False) -> dict[int, StorageError]:
        """Write what was kept and then `frames`, one item for each journal; keep what fails.

        With `clears`, drop what was kept, and empty the journals before `frames` are written.

        Returns:
            The failures, by the number of the journal.
        """
        failures = {}
        for number, of_one in enumerate(frames):
            wanted = self._kept[number] + of_one
            if clears:
                wanted = self._emptied(number) + of_one
            if not wanted:
                continue
            self._kept[number] = b""
            try:
                self.each[number].append(wanted)
            except StorageError as failure:
                failures[number] = failure
                self._kept[number] = wanted
        return failures

    def _emptied(self, number: int) -> bytes:
        """Empty a journal; if that fails, return what to write before its next frames."""
        self._kept[number] = b""
        try:
            self.each[number].clear()
        except StorageError:
            return cleared()
        return b""

    def has_kept_too_much(self, number: int) -> bool:
        """Return whether too much is kept for a journal, so that it should be emptied."""
        return len(self._kept[number]) > KEPT_BYTES_MAX

    def empty(self, number: int) -> None:
        """Empty a journal, so that a crash brings none of its blocks back."""
        self._kept[number] = self._emptied(number)

    def sync(self) -> Mapping[int, StorageError]:
        """Sync every journal, and return the failures by number. Called in another thread."""
        failures = {}
        for number, journal in enumerate(self.each):
            try:
                journal.sync()
            except StorageError as failure:
                failures[number] = failure
        return failures

    def missing(self) -> Missing | None:
        """Return the first journal that is no longer at its path; None if all are."""
        for journal in self.each:
            try:
                if not journal.is_in_place():
                    why = "was removed, replaced or moved away"
                    return Missing(str(journal.folder), str(journal.path), why)
            except OSError:
                continue  # it cannot be checked now, which proves nothing
        return None

    def close(self) -> None:
        """Close every journal. Idempotent."""
        for journal in self.each:
            journal.close()

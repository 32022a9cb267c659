"""The history of clears, so that nothing that began before a clear is stored after it.

The engine counts its clears; the count is its *generation*. A request carries the generation at
which it began, of this engine or of an earlier one, whose numbers are all lower. A clear of a
namespace concerns the requests of that namespace only.
"""

from __future__ import annotations

from collections.abc import Callable

ROOTS_MAX = 1024
"""How many clears of namespaces are remembered; older ones count as clears of everything."""


class ClearHistory:
    """The clears of one engine.

    Attributes:
        generation: grows by one with each clear.
        on_clear: called after each clear.
    """

    def __init__(self, first: int = 0) -> None:
        """Begin with generation `first`, which is above all generations of any earlier engine."""
        self.generation = first
        self.on_clear: Callable[[], None] = lambda: None
        self._all = 0
        self._roots: dict[bytes, int] = {}

    def note(self, root: bytes | None = None) -> None:
        """Record a clear: of a namespace by its root, or of everything."""
        self.generation += 1
        if root is None:
            self._all = self.generation
            self._roots.clear()
        else:
            self._roots.pop(root, None)
            self._roots[root] = self.generation
        if len(self._roots) > ROOTS_MAX:
            self._all = self._roots.pop(next(iter(self._roots)))
        self.on_clear()

    def is_stale(self, generation: int, root: bytes) -> bool:
        """Return whether a request of a namespace began before a clear that concerns it.

        A request that began in the current generation did not.
        """
        return generation < self._all or generation < self._roots.get(root, 0)

"""Identifies the weights of LoRA adapters by facts of their files, when a request names one.

vLLM loads an adapter once for each of its own ids, and again if it has dropped it meanwhile. So if
files change under one id, nobody knows whether the loaded weights are the old or the new ones, and
requests with that id are not cached from then on. Loading may move an adapter of the hub to another
commit, so such an adapter is looked at only after a request with it has run.

The files are looked at in a thread, since a scheduler's step must not wait for a file system that
hangs. Files that have not changed are not read again.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from flexkv.integration.vllm.files import Stamp, facts_of, hub_name_of, snapshot_of, stamps_of
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

LOOK_S = 0.25
"""How long a step waits for a look at an adapter's files."""
RACY_NS = 2_000_000_000
"""Files that changed less than this before a look may change again without a new time stamp."""
IDS_MAX = 1 << 16


class _Seen(NamedTuple):
    """The state of files at one look."""

    stamps: list[Stamp]
    facts: str
    is_settled: bool
    """Whether equal stamps mean equal files from now on."""


class _Look:
    """One look at an adapter's files, in a thread of its own."""

    def __init__(self, path: str, before: _Seen | None) -> None:
        self.seen = before
        self.error = ""
        self.is_of_hub = False
        self.over = threading.Event()
        threading.Thread(
            target=self._look, args=(path,), name="flexkv-adapter", daemon=True
        ).start()

    def _look(self, path: str) -> None:
        try:
            self.is_of_hub = is_of_hub(path)
            folder = snapshot_of(path, None) if self.is_of_hub else Path(path).expanduser()
            self.seen = _look_at(folder, self.seen)
        except (OSError, ValueError) as error:
            self.seen, self.error = None, str(error)
        self.over.set()


class Adapters:
    """The LoRA adapters that requests have named."""

    def __init__(self) -> None:
        self._looks: dict[str, _Look] = {}
        self._facts: dict[int, str] = {}
        """Each adapter's facts, by vLLM's id of it; empty once they have changed."""
        self._has_run: set[int] = set()
        self._told: set[tuple[str, str]] = set()

    def facts(self, lora: Any) -> str | None:
        """Return facts that identify an adapter's weights; None if they are not certain.

        Waits for `LOOK_S` at most, and not at all while an earlier look is still under way.

        Args:
            lora: vLLM's `LoRARequest`.
        """
        path, number = str(lora.lora_path), int(lora.lora_int_id)
        look = self._look(path)
        if look is not None and look.is_of_hub and number not in self._has_run:
            return None
        if look is None or look.seen is None:
            reason = "its file system does not answer" if look is None else look.error
            self._tell("adapter_not_cached", lora, reason)
            return None
        fresh = look.seen.facts
        if getattr(lora, "load_inplace", False):  # vLLM loads the files again
            self._remember(number, fresh)
            return fresh
        if self._facts.get(number, fresh) != fresh:
            self._tell("adapter_not_cached", lora, "its files have changed since it was loaded")
            self._facts[number] = ""
            return None
        self._remember(number, fresh)
        return fresh

    def has_run(self, lora: Any) -> None:
        """Record that a request with this adapter has run, so its files are on this machine."""
        if len(self._has_run) < IDS_MAX:
            self._has_run.add(int(lora.lora_int_id))

    def _look(self, path: str) -> _Look | None:
        """Return a finished look; None if it takes too long."""
        look = self._looks.get(path)
        if look is not None and not look.over.is_set():
            return None
        look = self._looks[path] = _Look(path, look.seen if look is not None else None)
        while len(self._looks) > IDS_MAX:
            del self._looks[next(iter(self._looks))]
        return look if look.over.wait(LOOK_S) else None

    def _remember(self, number: int, facts: str) -> None:
        self._facts[number] = facts
        while len(self._facts) > IDS_MAX:
            del self._facts[next(iter(self._facts))]

    def _tell(self, event: str, lora: Any, reason: str) -> None:
        """Log once for each adapter and reason."""
        key = (str(lora.lora_name), reason)
        if key not in self._told and len(self._told) < IDS_MAX:
            self._told.add(key)
            log.warning(event, adapter=lora.lora_name, path=lora.lora_path, reason=reason)


def is_of_hub(path: str) -> bool:
    """Return whether vLLM would take a path for a repository of the hub."""
    return not (path.startswith(("/", "~")) or Path(path).exists())


def _look_at(folder: Path, before: _Seen | None) -> _Seen:
    begin_ns = time.time_ns()
    stamps = stamps_of(folder)
    if before is not None and before.is_settled and before.stamps == stamps:
        return before
    facts = [hub_name_of(folder), facts_of(folder)]
    newest_ns = max(max(changed, inode) for _, _, changed, inode, _ in stamps)
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _Seen(stamps, digest, begin_ns - newest_ns > RACY_NS)

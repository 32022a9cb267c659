"""Facts that identify files of weights and LoRA adapters without reading all their bytes.

For each file: its name, its size, when it was changed, and a digest. The digest covers all of a
small file, and evenly spread samples of a large one, so that weights that were trained again differ
in it even where a copy has kept the times. A file of the Hugging Face cache that is a link to a
blob has the blob's name, which is a digest of its content, in place of the time.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

WHOLE_BYTES_MAX = 1 << 20
"""A file of at most this size is read as a whole."""
SAMPLES, SAMPLE_BYTES = 8, 4096
"""How many samples of a larger file are read, including its first and last bytes."""
FILES_MAX = 10_000

BESIDE_WEIGHTS = (
    ".*", "tokenizer*", "tokenization_*", "vocab*", "merges*.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "tekken.json", "*.tiktoken", "generation_config.json",
    "*.md", "license*",
)  # fmt: skip
"""Files that do not change the KV of given tokens."""

_HUB_FOLDER = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

FileFacts = tuple[str, int, int | str, str]
"""Name within the folder, size in bytes, time of change in ns or name of the blob, digest."""
Stamp = tuple[str, int, int, int, int]
"""Name within the folder, size in bytes, times of change of content and inode in ns, inode."""


def facts_of(place: Path) -> list[FileFacts]:
    """Return the facts of a file, or of each file below a folder, sorted by name.

    Raises:
        OSError: a file cannot be read, there is none, or there are too many.
    """
    return [_facts(name, path) for name, path in _files(place)]


def stamps_of(place: Path) -> list[Stamp]:
    """Return stamps by which to see, without reading files, whether the facts may have changed.

    Raises:
        OSError: as for `facts_of`.
    """
    stamps = []
    for name, path in _files(place):
        seen = path.stat()
        stamps.append((name, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino))
    return stamps


def hub_name_of(folder: Path) -> tuple[str, str] | None:
    """Return repository and commit of a snapshot in the Hugging Face cache; None for others."""
    found = _HUB_FOLDER.search(str(folder))
    return None if found is None else (found["repo"].replace("--", "/", 1), found["commit"])


def snapshot_of(repo: str, revision: str | None, cache: str | None = None) -> Path:
    """Return the folder of a hub repository's snapshot on this machine. Downloads nothing.

    Args:
        repo: "organisation/name".
        revision: branch, tag or commit; None for the default branch. vLLM may have resolved it.
        cache: folder; None for the usual one.

    Raises:
        OSError: there is no snapshot, or `repo` is not a valid name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    resolved = getattr(revision, "resolved", revision)
    try:
        return Path(snapshot_download(
            repo, revision=resolved, cache_dir=cache, local_files_only=True
        ))  # fmt: skip
    except HFValidationError as error:
        raise FileNotFoundError(str(error)) from error


def _files(place: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files below a folder that affect KV, sorted by name; links are followed."""
    if not place.is_dir():
        place.stat()
        yield place.name, place
        return
    found: list[tuple[str, Path]] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(place, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if _matters(name)]
        found += [(path.relative_to(place).as_posix(), path) for path in paths]
        if len(found) > FILES_MAX:
            raise OSError(f"{place} has more than {FILES_MAX} files")
    if not found:
        raise FileNotFoundError(f"no weight files in {place}")
    yield from sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _matters(name: str) -> bool:
    return not any(fnmatch(name.lower(), pattern) for pattern in BESIDE_WEIGHTS)


def _facts(name: str, path: Path) -> FileFacts:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        seen = os.fstat(file.fileno())
        size = seen.st_size
        if size <= WHOLE_BYTES_MAX:
            digest.update(file.readall())
        else:
            for sample in range(SAMPLES):
                at = (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, at))
    changed: int | str = seen.st_mtime_ns
    if path.is_symlink():
        target = path.resolve()
        if target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
            changed = target.name
    return name, size, changed, digest.hexdigest()

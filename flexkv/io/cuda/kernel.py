"""The paged-copy kernels: source, tables, and compilation with NVRTC, kept on disk."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import BackendUnavailableError
from flexkv.io.cuda import kept
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

NAME = "paged_copy"
PART_BYTES = 32768
"""The bytes that a thread block copies at a time; the source has the same number."""
THREADS = 512
BULK_NAME, BULK_SINCE = "paged_copy_bulk", 9
"""The kernel of bulk copies, and the first major compute capability that has them."""
LANES, STAGES_MIN, STAGES_MAX = 32, 3, 64
"""Threads of its thread blocks, and the bounds of its number of stages; as in the source."""
STAGE_MEMORY, STAGE_MEMORY_LESS = 192 << 10, 2 << 10
"""Most shared memory for its stages, and what they must leave to the rest of a thread block."""
BULK_ALIGNMENT, BULK_BYTES_MIN, STAGE_ALIGNMENT = 16, 512, 128
"""The alignment of addresses and sizes that the hardware wants; the smallest piece worth a bulk
copy, which takes half a microsecond of a thread block; and the alignment of stages."""


def source() -> str:
    """Return the CUDA C++ source of the kernels."""
    return (files(__package__) / f"{NAME}.cu").read_text()


def part_starts(piece_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of parts before each piece of a block, then in all: int64[pieces + 1]."""
    return np.concatenate([[0], np.cumsum(-(-piece_bytes // PART_BYTES))]).astype(np.int64)


def stage_bytes(pieces: NDArray[np.int64], *host: int) -> int:
    """Return the bytes of a stage for these pieces; 0 if bulk copies do not suit.

    Args:
        pieces: int64[n, 4]: base, stride, bytes and offset of each.
        host: addresses and strides of the blocks in host memory.
    """
    sizes = pieces[:, 2]
    if sizes.min() < BULK_BYTES_MIN or any(each % BULK_ALIGNMENT for each in host):
        return 0
    if (pieces % BULK_ALIGNMENT).any():
        return 0
    largest = min(int(sizes.max()), PART_BYTES)
    return -(-largest // STAGE_ALIGNMENT) * STAGE_ALIGNMENT


def stages(size: int, memory: int) -> int:
    """Return how many stages of `size` bytes a thread block gets; 0 if it makes no bulk copies."""
    count = min(memory // size, STAGES_MAX) if size else 0
    return count if count >= STAGES_MIN else 0


def cubin(architecture: str, cache: Path | None = None, anew: bool = False) -> bytes:
    """Return the kernels' machine code for an architecture such as "sm_90".

    It is compiled once for each source, architecture and compiler, and kept in `cache`, by default
    $XDG_CACHE_HOME/flexkv. `anew` compiles it again, for when the kept code is bad.

    Raises:
        BackendUnavailableError: NVRTC is not installed, or does not know the architecture.
    """
    try:
        from cuda.bindings import nvrtc

        version = _checked(nvrtc, nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:  # the latter if the library is missing
        raise BackendUnavailableError("nvrtc", f"{error}; install flexkv[cuda]") from error
    text = source()
    name = f"{NAME}-{architecture}-{kept.name_of(text, version)}.cubin"
    path = (cache or kept.folder()) / name
    if not anew and (code := kept.read(path)):
        return code
    code = _compile(nvrtc, text, architecture)
    kept.write(path, code)
    log.info("kernel_compiled", kernel=NAME, architecture=architecture, bytes=len(code))
    return code


def _compile(nvrtc: Any, text: str, architecture: str) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), b"paged_copy.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            notes = b" " * _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, notes))
            why = f"{architecture}: {result.name} {notes.decode(errors='replace').strip()}"
            raise BackendUnavailableError("nvrtc", why)
        code = bytes(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))  # fills it
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendUnavailableError("nvrtc", result.name)
    return values[0] if len(values) == 1 else tuple(values)

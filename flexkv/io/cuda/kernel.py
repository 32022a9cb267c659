"""The paged-copy kernel: its source, its tables, and its compilation with NVRTC, kept on disk."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import BackendUnavailableError
from flexkv.io.cuda import kept
from flexkv.logs import get_logger

log = get_logger(__name__)

NAME = "paged_copy"
PART_BYTES = 32768
"""As in the source: what a thread block copies at a time."""
THREADS = 512


def source() -> str:
    """Give the CUDA C++ source of the kernel."""
    return (files(__package__) / f"{NAME}.cu").read_text()


def part_starts(piece_bytes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give how many parts of a block are before each piece, and of all: int64[pieces + 1]."""
    return np.concatenate([[0], np.cumsum(-(-piece_bytes // PART_BYTES))]).astype(np.int64)


def cubin(architecture: str, cache: Path | None = None, anew: bool = False) -> bytes:
    """Give the kernel's machine code for an architecture such as "sm_90".

    It is compiled once for each source, architecture and compiler, and kept in `cache`, by default
    $XDG_CACHE_HOME/flexkv; `anew`, when what is kept was no good, compiles it again.

    Raises:
        BackendUnavailableError: NVRTC is not installed, or does not know the architecture.
    """
    try:
        from cuda.bindings import nvrtc

        version = _checked(nvrtc, nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:  # what it raises where the library is not there
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

"""Run a script to which the kernel refuses system calls, as a container's seccomp profile does.

    python -m tests.machine.seccomp '[[426, 1]]' script.py arguments…

Each rule is a call's number and the errno, and optionally an argument's index and value.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import runpy
import struct
import sys
from collections.abc import Sequence

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427
MADVISE, FALLOCATE, MEMFD_CREATE = (
    (28, 285, 319) if platform.machine() == "x86_64" else (233, 47, 279)
)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARGUMENTS_AT = 0, 16


def _instruction(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, jump_true, jump_false, value)


def program(rules: Sequence[Sequence[int]]) -> bytes:
    """Return a BPF program that refuses the calls that the rules name, and allows all others."""
    code = b""
    for number, errno, *argument in rules:
        refuse = _instruction(_RETURN, _ERRNO | errno)
        if argument:
            index, value = argument
            refuse = (
                _instruction(_LOAD, _ARGUMENTS_AT + 8 * index)
                + _instruction(_JUMP_IF_EQUAL, value, 0, 1)
                + refuse
            )
        code += _instruction(_LOAD, _NUMBER_AT)
        code += _instruction(_JUMP_IF_EQUAL, number, 0, len(refuse) // 8) + refuse
    return code + _instruction(_RETURN, _ALLOW)


def refuse(rules: Sequence[Sequence[int]]) -> None:
    """Make the kernel refuse calls of this process and its children from now on."""
    code = program(rules)
    buffer = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("=H6xQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.create_string_buffer(head, len(head)), 0, 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    refuse(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")

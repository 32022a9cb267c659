"""Makes the kernel drop what asks a listening socket for new connections, by its address.

The filter is a program in classic BPF, which the kernel runs for each packet to the socket, before
it makes anything of it: a dropped packet costs this process nothing. Connections that are accepted
inherit the program of that time. It looks at addresses only if a packet begins a connection, so it
drops nothing of theirs, and costs their packets next to nothing.

Source: the kernel's Documentation/networking/filter.rst and include/uapi/linux/filter.h.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import numpy as np

from flexkv.cluster.strangers import ShutOut

_ATTACH, _DETACH = 26, 27
"""SO_ATTACH_FILTER and SO_DETACH_FILTER of x86 and ARM."""
_BYTE, _WORD, _AND, _SHIFT, _JUMP, _EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x74, 0x05, 0x15, 0x06
_PASS, _DROP = 0xFFFFFFFF, 0
_NETWORK = 0xFFF00000
"""Offsets from here on count from the IP header; others count from the TCP header."""
_V4_SOURCE, _V6_SOURCE = _NETWORK + 12, _NETWORK + 8
_FLAGS, _SYN, _SYN_OR_ACK = 13, 0x02, 0x12

_Code = tuple[int, int, int, int]
"""An instruction: what it does, how many to skip if it is true, and if not, and a number."""


def apply(listening: socket.socket, shut_out: ShutOut) -> None:
    """Have the kernel drop attempts to connect from the addresses that are shut out, and no others.

    Raises:
        OSError: the kernel refuses.
    """
    if shut_out == ShutOut():
        remove(listening)
        return
    codes = _program(shut_out)
    packed = np.frombuffer(b"".join(struct.pack("=HBBI", *code) for code in codes), np.uint8)
    program = struct.pack("@HP", len(codes), packed.ctypes.data)
    listening.setsockopt(socket.SOL_SOCKET, _ATTACH, program)


def remove(listening: socket.socket) -> None:
    """Have the kernel drop nothing any more."""
    with suppress(OSError):  # there is no filter
        listening.setsockopt(socket.SOL_SOCKET, _DETACH, 0)


def _program(shut_out: ShutOut) -> list[_Code]:
    listed, others = (_PASS, _DROP) if shut_out.is_all else (_DROP, _PASS)
    v4: list[_Code] = [(_WORD, 0, 0, _V4_SOURCE)]
    v6: list[_Code] = []
    for source in sorted(shut_out.sources):
        if len(source) == 4:
            v4 += [(_EQUAL, 0, 1, int.from_bytes(source, "big")), (_RETURN, 0, 0, listed)]
        else:
            high, low = struct.unpack(">II", source)
            v6 += [
                (_WORD, 0, 0, _V6_SOURCE), (_EQUAL, 0, 3, high),
                (_WORD, 0, 0, _V6_SOURCE + 4), (_EQUAL, 0, 1, low), (_RETURN, 0, 0, listed),
            ]  # fmt: skip
    v4.append((_RETURN, 0, 0, others))
    v6.append((_RETURN, 0, 0, others))
    return [
        (_BYTE, 0, 0, _FLAGS), (_AND, 0, 0, _SYN_OR_ACK),
        (_EQUAL, 1, 0, _SYN), (_RETURN, 0, 0, _PASS),
        (_BYTE, 0, 0, _NETWORK), (_SHIFT, 0, 0, 4),
        (_EQUAL, 1, 0, 4), (_JUMP, 0, 0, len(v4)),
        *v4, *v6,
    ]  # fmt: skip

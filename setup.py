"""Build of the C extension `flexkv._ext`: one abi3 module for every Python from 3.11 on.

liburing is linked statically if its archive is installed, so that the wheel needs no system
library. xxhash is inlined from its header. Both are packages of the distribution (`liburing-dev`,
`libxxhash-dev`). `EXT_SANITIZE=1` builds with ASan and UBSan.
"""

import os
import subprocess
from pathlib import Path

from setuptools import Extension, setup

PY_LIMITED_API = "0x030B0000"


def liburing_link() -> dict[str, list[str]]:
    """Return the link arguments for liburing: its static archive if installed, else the library."""
    found = subprocess.run(
        [os.environ.get("CC", "gcc"), "-print-file-name=liburing.a"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if Path(found).is_absolute():
        return {"extra_objects": [found]}
    return {"libraries": ["uring"]}


# The index has many small functions in several files: without LTO a put takes a third longer.
OPTIMISE = ["-O3", "-flto"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
optimise = SANITIZE if os.environ.get("EXT_SANITIZE") == "1" else OPTIMISE

setup(
    ext_modules=[
        Extension(
            "flexkv._ext",
            sources=sorted(str(path) for path in Path("ext").glob("*.c")),
            depends=sorted(str(path) for path in Path("ext").glob("*.h")),
            define_macros=[("Py_LIMITED_API", PY_LIMITED_API)],
            py_limited_api=True,
            extra_compile_args=[
                "-std=gnu11",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-fvisibility=hidden",
                *optimise,
            ],
            extra_link_args=["-pthread", *optimise],
            **liburing_link(),
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""A pytest plugin without which FlexKV could be imported: vLLM's own tests have a mock for it."""

from __future__ import annotations

import sys
from typing import Any


class Hidden:
    """Finds no package of FlexKV's."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse what is ours; others are found by others."""
        if name.partition(".")[0] == "flexkv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())

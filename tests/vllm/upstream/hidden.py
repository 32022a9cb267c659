"""A pytest plugin that hides FlexKV, for which vLLM's own tests have a mock."""

from __future__ import annotations

import sys
from typing import Any


class Hidden:
    """An import finder that refuses FlexKV's packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise for FlexKV's packages; return None for others, which other finders find."""
        if name.partition(".")[0] == "flexkv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())

"""FlexKV: KV-cache blocks that move between GPU, host memory, SSD and remote storage."""

__version__ = "0.1.0"

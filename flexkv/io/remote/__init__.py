"""The remote tier's I/O: spans of blocks as objects of a store, each block with its proof."""

"""Checksums of blocks, and the ports that make and check them."""

"""Checksums of blocks."""

"""Benchmarks: each figure beside its limit or a peer, measured in the same run, as a ratio."""

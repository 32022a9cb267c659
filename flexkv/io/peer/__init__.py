"""Blocks from other nodes over TCP: their sockets, and the port of the peers' tier."""

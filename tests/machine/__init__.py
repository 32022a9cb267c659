"""Tests that need mounts, cgroups, networks, refused calls or other Pythons: `make test-system`."""

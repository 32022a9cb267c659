"""Tests that need mounts, cgroups, refused system calls or other Pythons: `make test-system`."""

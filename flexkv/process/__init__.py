"""Dealings with the operating system: forks, threads, descriptors, CPUs."""

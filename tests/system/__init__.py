"""Tests over real memory, files and devices."""

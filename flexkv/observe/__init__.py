"""Observation of an engine: log lines, counts and trace records."""

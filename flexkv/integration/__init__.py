"""Connectors to inference engines, whose terms are used in these folders only."""

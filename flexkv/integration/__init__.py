"""Connectors to engines: their words end here."""

"""Connections that carry whole messages, whatever these say."""

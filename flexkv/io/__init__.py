"""Ports, which actors know, and the adapters that reach real devices through them."""

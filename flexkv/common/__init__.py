"""The lowest layer, without I/O: terms, errors, configuration, layouts, requests."""

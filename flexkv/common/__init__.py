"""Pure ground floor: terms, errors, configuration, layouts, requests."""

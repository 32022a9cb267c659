"""Records of what happened to every request and op."""

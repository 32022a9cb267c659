"""Where the words of inference engines end."""

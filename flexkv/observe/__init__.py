"""What writes down what happens: log lines, counts, trace records."""

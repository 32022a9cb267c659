"""Work on recorded traces: load, explain, show, convert; and hit rates of request traces."""

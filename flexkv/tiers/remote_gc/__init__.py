"""What is deleted from the pools of a store, by which engine, and what keeps a span from that."""

"""One engine for several processes: the server, its clients, and the agents of devices."""

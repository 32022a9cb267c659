"""What the operating system does to a process: forks, threads, descriptors, CPUs."""

"""The CUDA device: its driver, its kernel, its transfer port."""

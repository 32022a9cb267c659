"""The CUDA device: its driver, its kernels, its transfer port."""

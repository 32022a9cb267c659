"""Devices without CUDA, and several devices as one."""

"""Triton kernels for CUDA tensors; one launch a lookup."""

"""Fused loops for numpy arrays, compiled by numba; they release the GIL."""

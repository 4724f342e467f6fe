"""Measurements: kernels beside what the machine can do, schemes beside each other."""

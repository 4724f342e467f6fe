"""Benchmarks of the whole system: what starts servers, loads them, or needs a graphics card. See README.md."""

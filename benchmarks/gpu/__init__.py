"""Checks and benchmarks for a GPU, within a time limit: see `__main__`."""

"""Benchmarks: `python -m benchmarks NAME` prints a table of ratios, measured in one process."""

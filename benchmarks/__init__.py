"""Benchmarks: each prints a table, and one JSON object as its last line. `python -m benchmarks.sampling --quick`."""

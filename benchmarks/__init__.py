"""Benchmarks beside the reference and peers; `python -m benchmarks --help`, or `pytest benchmarks`."""

"""Benchmarks: pairs of implementations timed against each other with `python -m benchmarks`. Not installed."""

"""Two ways of doing one thing, timed in one run: `python -m benchmarks`. Not installed."""

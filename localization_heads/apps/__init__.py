"""Command-line programs and the demo: they read options, call the stages and print results."""

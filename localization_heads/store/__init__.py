"""Attention files, analyses, statistics, predictions and tables: written atomically, read as untrusted input."""

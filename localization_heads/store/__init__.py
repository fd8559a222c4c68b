"""Attention files, analyses, statistics, predictions and tables on disk: written whole, read with suspicion."""

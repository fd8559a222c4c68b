"""Hydra configuration: one file a front end, one group an axis."""

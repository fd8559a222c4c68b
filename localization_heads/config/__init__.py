"""Presets for Hydra: one folder per option group, one file per preset."""

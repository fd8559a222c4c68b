"""Samples, images and the synthetic scenes."""

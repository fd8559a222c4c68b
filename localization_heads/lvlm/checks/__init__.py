"""Checks of a model: captured rows against eager attention, and geometry against traced pixels."""

"""Interventions on attention heads: switching them off, and steering them."""

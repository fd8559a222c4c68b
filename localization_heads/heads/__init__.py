"""Pure functions that turn attention maps into a ranking of heads (Sec. 4 of the paper)."""

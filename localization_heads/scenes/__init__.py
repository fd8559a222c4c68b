"""The synthetic benchmark: endless scenes with exact masks, and expressions that refer to exactly one object."""

"""How good boxes and masks are: metrics, controls to compare with, and bootstrap intervals."""

"""How good the boxes and masks are."""

"""From attention maps to boxes and masks (Sec. 5 of the paper)."""

"""What a model writes: generated answers, their words and boxes, and where heads look meanwhile."""

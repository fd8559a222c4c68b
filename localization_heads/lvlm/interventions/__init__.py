"""Heads switched off and heads steered."""

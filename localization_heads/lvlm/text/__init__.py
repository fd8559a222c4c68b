"""From an expression to a prompt, its tokens and its query tokens."""

"""The forward pass: attention captured on the way, the shared prefix, changed heads, failures."""

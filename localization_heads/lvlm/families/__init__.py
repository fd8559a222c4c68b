"""Model families: where their image tokens lie in the image."""

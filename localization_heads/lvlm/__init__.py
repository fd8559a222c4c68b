"""The model side: loading, prompting, capturing attention, and where each image token lies."""

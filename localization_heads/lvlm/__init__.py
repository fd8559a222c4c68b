"""The vision-language model: loading, geometry of image tokens, prompts, capture of attention, answers."""

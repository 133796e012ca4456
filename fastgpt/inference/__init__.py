"""From prompts to tokens: the loop, its cache, samplers and engines."""

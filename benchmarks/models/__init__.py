"""What users wait for: generation, a token, training steps, memory, imports; and the models that are compared."""

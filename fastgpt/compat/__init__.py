"""Other people's interfaces over this model, one module each."""

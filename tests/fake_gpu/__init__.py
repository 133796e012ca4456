"""A pretended H100 for the host's code; see README.md."""

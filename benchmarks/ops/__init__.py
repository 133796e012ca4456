"""A file an op, named like its kernel: inputs, sizes, work by formula, peers."""

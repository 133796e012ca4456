"""Runs the PTX that Triton compiles for a GPU that isn't here, thread by thread on a CPU, and checks every access: README.md."""

"""Triton kernels for GPT-2-family models, forward and backward, behind the signatures of `fastgpt.reference`."""

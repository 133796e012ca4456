"""Training a tiny GPT in bf16 on the machine follows the float64 reference."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate_as_torch
from models import tiny_model
from ptx_machine.machine import machine

from fastgpt import use_backend

STEPS = 50


def losses(dtype: torch.dtype, backend: str, batches: torch.Tensor) -> torch.Tensor:
    """Loss before each AdamW step over the batches in turn."""
    model = tiny_model(vocab_size=53, context_length=8, emb_dim=32, n_heads=2, init="gpt2", tie_weights=True)
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    with use_backend(backend):
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            loss = model.loss(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return torch.stack(seen)


@pytest.mark.one_of("training")
def test_fifty_steps_in_bf16_follow_the_float64_reference(arch):
    batches = torch.randint(53, (3, 2, 9))
    exact, plain = (losses(dtype, "reference", batches) for dtype in (torch.float64, torch.bfloat16))
    with machine(arch):
        ours = losses(torch.bfloat16, "triton", batches)
    assert exact[-1] < 0.7 * exact[0]
    assert_as_accurate_as_torch(ours, plain, exact, "losses")

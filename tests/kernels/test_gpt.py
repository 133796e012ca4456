"""The whole model on the Triton path: training follows the float64 reference, generation gives the reference's tokens."""

from __future__ import annotations

import inspect

import pytest
import torch
from compare import assert_as_accurate_as_torch
from fused_token import wide_tiles
from models import tiny_model

import fastgpt_kernels
from fastgpt import GPTModel, generate, ops, reference, use_backend


@pytest.mark.parametrize("op", ops.OPS)
def test_kernels_have_the_references_signature(op):
    assert inspect.signature(getattr(fastgpt_kernels, op)) == inspect.signature(getattr(reference, op))


def losses(model: GPTModel, backend: str, batches: torch.Tensor, steps: int) -> torch.Tensor:
    """Loss before each of `steps` AdamW steps over the batches in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    with use_backend(backend):
        for step in range(steps):
            batch = batches[step % len(batches)]
            loss = model.loss(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.detach())
    return torch.stack(seen)


@pytest.mark.parametrize(
    ("steps", "variant"),
    [(12, {"tie_weights": True, "n_layers": 1}), (6, {"norm_position": "post", "activation": "relu", "bias": False})],
)
def test_training_follows_the_float64_reference(device, steps, variant):
    """A few steps of two models; fifty are made by compiled kernels, in tests/ptx_machine/lane."""
    shape = {"vocab_size": 53, "context_length": 8, "emb_dim": 32, "n_heads": 2, "init": "gpt2", **variant}
    batches = torch.randint(53, (3, 2, 9), device=device)

    def fresh(dtype: torch.dtype) -> GPTModel:
        return tiny_model(**shape).to(device, dtype).train()

    exact = losses(fresh(torch.float64), "reference", batches, steps)
    plain = losses(fresh(torch.float32), "reference", batches, steps)
    ours = losses(fresh(torch.float32), "triton", batches, steps)
    assert exact[-1] < 0.95 * exact[0]
    assert_as_accurate_as_torch(ours, plain, exact, "losses")


def test_generation_gives_the_references_tokens(device, monkeypatch):
    wide_tiles(monkeypatch)
    model = tiny_model().to(device)
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    expected = generate(model.double(), prompts, 8)  # float64: its argmax is the exact one
    with use_backend("triton"):
        assert generate(model.float(), prompts, 8) == expected


def test_dropout_masks_repeat_with_the_seed(device):
    model = tiny_model(drop_rate=0.3).to(device).train()
    idx = torch.randint(101, (2, 8), device=device)
    with use_backend("triton"):
        torch.manual_seed(1)
        once = model.loss(idx, idx)
        torch.manual_seed(1)
        assert torch.equal(model.loss(idx, idx), once)
        assert not torch.equal(model.loss(idx, idx), once)


def test_compiles_without_a_graph_break(device):
    model = tiny_model().to(device)
    idx = torch.randint(101, (2, 8), device=device)
    with use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(idx), model(idx))

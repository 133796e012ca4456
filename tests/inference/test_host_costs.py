"""What generation costs the host a token: nothing made of host data, and a read of the device once in a burst."""

from __future__ import annotations

import pytest
import torch
from fused_token import wide_tiles
from models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPTModel, generate, use_backend
from fastgpt.inference import generate as generation

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

PROMPTS = [[5, 6, 7], [9]]


class Costs(TorchDispatchMode):
    """Tensors made of host data, which on a GPU are uploads."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func._schema.name == "aten::lift_fresh"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(device, monkeypatch) -> GPTModel:
    wide_tiles(monkeypatch)
    monkeypatch.setattr(generation, "LOOK_EVERY", 4)
    return tiny_model(n_layers=1, context_length=32).to(device)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    made = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: made.append(1) or tolist(self))
    return made


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({}, 4),
        ({"temperature": 0.9, "top_k": 5, "repetition_penalty": 1.2}, 4),
        ({"temperature": 0.9, "stop_tokens": [1000]}, 1),
    ],
)
def test_more_tokens_upload_nothing_and_are_read_in_bursts(model, reads, backend, options, every):
    uploads, read = [], []
    for count in (4, 12):
        reads.clear()
        with use_backend(backend), Costs() as costs:
            done = generate(model, PROMPTS, count, **options)
        assert {len(row.tokens) for row in done} == {count}
        uploads.append(costs.made)
        read.append(len(reads))
    assert uploads[0] == uploads[1]
    assert read[1] - read[0] == 8 // every

"""What a training step does around its kernels: no copies of a layer's size, norms in the dtype of the product behind them."""

from __future__ import annotations

import pytest
import torch
from models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import use_backend
from fastgpt.layers import LayerNorm

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


class Ops(TorchDispatchMode):
    """Every op as (name, elements of its result, dtype of its result)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.append((func.overloadpacket.__name__, out.numel(), out.dtype))
        return out


COPIES = {"clone", "copy_", "stack", "cat", "_to_copy", "contiguous"}
B, T, C = 2, 48, 16  # [B, T, 3 C] is larger than any weight


def model_and_batch(device, **changes):
    torch.manual_seed(0)
    model = tiny_model(context_length=T, emb_dim=C, n_heads=2, vocab_size=20, n_layers=2, **changes).to(device).train()
    return model, torch.randint(20, (B, T), device=device)


@pytest.mark.parametrize("documents", [False, True])
def test_backward_copies_no_gradient_of_a_packed_qkv(documents, device):
    model, idx = model_and_batch(device, qkv_bias=True)
    starts = (torch.arange(T, device=device) // 12 * 12).expand(B, T) if documents else None
    with use_backend("triton"):
        loss = model.loss(idx, idx.roll(1), starts=starts)
        with Ops() as ops:
            loss.backward()
    assert [op for op in ops.seen if op[0] in COPIES and op[1] >= 3 * B * T * C] == []
    assert sum(op[0] == "_attention_bwd" for op in ops.seen) == 2


def test_a_norms_input_has_one_gradient_and_no_addition(device):
    model, idx = model_and_batch(device)
    with use_backend("triton"):
        loss = model.loss(idx, idx.roll(1))
        with Ops() as ops:
            loss.backward()
    # torch's engine adds where two gradients of one tensor meet
    assert [op for op in ops.seen if op[0] in ("add", "add_") and op[1] == B * T * C] == []


def casts(device, model, idx):
    with use_backend("triton"), torch.autocast(device.type, torch.float16), Ops() as ops:
        loss = model.loss(idx, idx.roll(1))
    with Ops() as backward_ops:
        loss.backward()
    seen = [op for op in ops.seen + backward_ops.seen if op[0] == "_to_copy" and op[1] == B * T * C]
    return loss.detach(), [p.grad.clone() for p in model.parameters()], len(seen)


def test_under_autocast_a_norm_writes_what_its_product_reads(device, monkeypatch):
    """The same bits as with a cast between, a cast less forward and one less backward for each norm of a block."""
    model, idx = model_and_batch(device)
    loss, gradients, count = casts(device, model, idx)
    model.zero_grad()
    monkeypatch.setattr("fastgpt.layers.products_dtype", lambda x: None)
    cast_loss, cast_gradients, cast_count = casts(device, model, idx)
    assert torch.equal(loss, cast_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, cast_gradients, strict=True))
    assert cast_count - count == 2 * 2 * 2


def test_hooks_on_a_norm_see_its_own_dtype_under_autocast(device):
    model, idx = model_and_batch(device)
    seen = []
    for block in model.trf_blocks:
        for norm in (block.norm1, block.norm2):
            assert isinstance(norm, LayerNorm)
            norm.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with use_backend("triton"), torch.autocast(device.type, torch.float16), torch.no_grad():
        model.loss(idx, idx)
    assert seen == [torch.float32] * 4

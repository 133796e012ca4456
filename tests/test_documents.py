"""Packed rows: with `starts`, each document gets what it gets alone."""

from __future__ import annotations

import copy

import pytest
import torch
from compare import assert_as_accurate_as_torch
from models import tiny_model
from torch.utils.checkpoint import checkpoint

from fastgpt import KVCache, use_backend

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

LENGTHS = [[3, 10, 7], [20], [1] * 5 + [15]]
T = 20

BACKENDS = ["reference", "triton"]


def starts_of(lengths, device="cpu"):
    rows = [[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in lengths]
    return torch.tensor(rows, device=device)


def model_of(device, **changes):
    torch.manual_seed(0)
    shape = {"context_length": T, "emb_dim": 32, "n_heads": 2, "vocab_size": 30, "qkv_bias": True} | changes
    return tiny_model(**shape).to(device)


def alone(model, idx):
    """Logits [3, T, V] and gradients of the mean loss over all documents' tokens, a document a call."""
    logits = torch.zeros(*idx.shape, 30, dtype=model.tok_emb.weight.dtype, device=idx.device)
    total = 0.0
    for b, row in enumerate(LENGTHS):
        begin = 0
        for n in row:
            document = idx[b : b + 1, begin : begin + n]
            logits[b, begin : begin + n] = model(document).detach()
            total = total + model.loss(document, document) * n / idx.numel()
            begin += n
    total.backward()
    return logits, total.detach(), [p.grad for p in model.parameters()]


def packed(model, idx, starts):
    logits = model(idx, starts=starts).detach()
    loss = model.loss(idx, idx, starts=starts)
    loss.backward()
    return logits, loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [{}, {"norm_position": "post"}], ids=str)
def test_documents_in_a_row_are_what_each_is_alone(variant, backend, device):
    model = model_of(device, **variant)
    idx = torch.randint(30, (3, T), device=device)
    double, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    with use_backend("reference"):
        exact, theirs = alone(double, idx), alone(same, idx)
    with use_backend(backend):
        ours = packed(model, idx, starts_of(LENGTHS, device))
    for name, o, t, e in zip(("logits", "loss"), ours, theirs, exact, strict=False):
        assert_as_accurate_as_torch(o, t, e, name)
    for (name, _), o, t, e in zip(model.named_parameters(), ours[2], theirs[2], exact[2], strict=True):
        error, allowed = ((g.double() - e).norm() for g in (o, t))
        assert error <= 4 * allowed + 1e-5 * e.norm(), f"{name}: an error of {error}, alone {allowed}, of {e.norm()}"


def test_one_document_a_row_changes_nothing(device):
    model, idx = model_of(device).double(), torch.randint(30, (2, T), device=device)
    starts = torch.zeros_like(idx)
    torch.testing.assert_close(model(idx, starts=starts), model(idx))
    torch.testing.assert_close(model.loss(idx, idx, starts=starts.int()), model.loss(idx, idx))


def test_logits_at_and_swapped_embeddings(device):
    model, idx, starts = model_of(device), torch.randint(30, (3, T), device=device), starts_of(LENGTHS, device)
    expected = model(idx, starts=starts)
    at = torch.tensor([2, 19, 7], device=device)
    torch.testing.assert_close(model(idx, starts=starts, logits_at=at)[:, 0], expected[torch.arange(3), at])
    model.pos_emb.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(model(idx, starts=starts), expected)


def test_recompute_gives_the_same_gradients(device):
    model, idx, starts = model_of(device), torch.randint(30, (3, T), device=device), starts_of(LENGTHS, device)
    again = copy.deepcopy(model)
    for block in again.trf_blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    for ours, expected in zip(packed(again, idx, starts)[2], packed(model, idx, starts)[2], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend, device):
    model, idx, starts = model_of(device), torch.randint(30, (3, T), device=device), starts_of(LENGTHS, device)

    def loss(idx, starts):
        return model.loss(idx, idx, starts=starts, label_smoothing=0.1, z_loss=0.01)

    with use_backend(backend):
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(idx, starts), loss(idx, starts))


def test_autocast_runs(device):
    model, idx, starts = model_of(device), torch.randint(30, (3, T), device=device), starts_of(LENGTHS, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = model.loss(idx, idx, starts=starts)
    torch.testing.assert_close(loss, model.loss(idx, idx, starts=starts), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("ties", [False, True])
def test_losses_options_reach_the_op(ties, device):
    model, idx = model_of(device, tie_weights=ties).double(), torch.randint(30, (2, T), device=device)
    logits = model(idx).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, idx.flatten(), label_smoothing=0.2)
    expected = expected + 0.03 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(model.loss(idx, idx, label_smoothing=0.2, z_loss=0.03), expected)
    model.out_head.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(model.loss(idx, idx, label_smoothing=0.2, z_loss=0.03), expected)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.zeros(1, 4), r"starts must be int32 or int64 of idx's shape \[1, 4\], got torch.float32 \[1, 4\]"),
        (torch.zeros(4, dtype=torch.int64), r"got torch.int64 \[4\]"),
        (torch.tensor([[0, 1, 0, 0]]), "starts must ascend along a row, from 0 to the token's place, got 0 at 2"),
        (torch.tensor([[0, 0, 3, 3]]), "got 3 at 2"),
        (torch.tensor([[-1, 0, 0, 0]]), "got -1 at 0"),
    ],
)
def test_bad_starts_are_named(starts, message):
    with pytest.raises(ValueError, match=message):
        model_of("cpu")(torch.zeros(1, 4, dtype=torch.int64), starts=starts)


def test_starts_go_with_no_cache_and_no_later_positions():
    idx = torch.zeros(1, 4, dtype=torch.int64)
    model = model_of("cpu").eval()
    cache = KVCache(model.config, 1, T)
    with pytest.raises(ValueError, match="starts go with neither a cache"):
        model(idx, cache, starts=idx)
    with pytest.raises(ValueError, match="nor causal=False"):
        model_of("cpu", causal=False)(idx, starts=idx)

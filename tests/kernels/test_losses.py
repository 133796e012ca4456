"""Label smoothing, z-loss and what linear_cross_entropy tells beside its loss, against torch and float64."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_torch
from mutants import mutants

from fastgpt import reference

kernels = importlib.import_module("fastgpt_kernels.cross_entropy")

DTYPES = [torch.float32, torch.float16]
LOSSES = [(0.1, 0.0), (0.0, 0.01), (0.3, 0.02), (1.0, 0.0)]


def some_targets(N, V, device):
    targets = torch.randint(0, V, (N,), device=device)
    targets[N // 3] = -100
    return targets


def by_definition(logits, targets, label_smoothing, z_loss, reduction="mean"):
    """torch's own loss, and the mean of the squared logsumexp where a target counts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, reduction="none", label_smoothing=label_smoothing)
    used = targets != -100
    loss = loss + torch.where(used, z_loss * wide.logsumexp(1) ** 2, 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / used.sum()}[reduction]


def compare(op, logits, targets, losses, reduction, names=("loss", "dlogits"), definition=by_definition):
    results = []
    for run, dtype in ((op, logits[0].dtype), (definition, logits[0].dtype), (definition, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in logits]
        loss = run(*leaves, targets, *losses, reduction)
        weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
        (loss * weights).sum().backward()
        results.append((loss, *(leaf.grad for leaf in leaves)))
    for name, three in zip(names, zip(*results, strict=True), strict=True):
        assert_as_accurate_as_torch(*three, name)


def ours(module):
    return lambda x, t, e, z, reduction: module.cross_entropy(x, t, -100, reduction, e, z)


def linear(module):
    return lambda x, w, b, t, e, z, reduction: module.linear_cross_entropy(x, w, t, b, -100, reduction, e, z)


def linear_by_definition(x, weight, bias, targets, *how):
    return by_definition(F.linear(x, weight, bias), targets, *how)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_cross_entropy(losses, reduction, dtype, device):
    for V in (3, 257, 8193):
        logits = torch.randn(4, V, device=device).mul(3).to(dtype)
        compare(ours(kernels), [logits], some_targets(4, V, device), losses, reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
def test_linear_cross_entropy(reduction, dtype, device, monkeypatch):
    monkeypatch.setattr(kernels, "_chunk_bytes", lambda device: 1)
    monkeypatch.setattr(kernels, "CHUNK_MULTIPLE", 2)
    tensors = [torch.randn(*shape, device=device).to(dtype) for shape in ((5, 16), (67, 16), (67,))]
    names = "loss", "dx", "dweight", "dbias"
    compare(linear(kernels), tensors, some_targets(5, 67, device), (0.1, 0.02), reduction, names, linear_by_definition)


@pytest.mark.parametrize("reduction", kernels.REDUCTIONS)
def test_the_reference_is_the_definition(reduction, device):
    logits, targets = torch.randn(4, 30, device=device).double(), some_targets(4, 30, device)
    for e, z in LOSSES:
        expected = by_definition(logits, targets, e, z, reduction)
        torch.testing.assert_close(reference.cross_entropy(logits, targets, -100, reduction, e, z), expected)


def test_logits_of_minus_infinity(device):
    logits = torch.randn(3, 40, device=device)
    logits[:, 7] = -torch.inf
    targets = torch.tensor([7, 3, -100], device=device)
    losses = kernels.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert losses.tolist() == [torch.inf, torch.inf, 0.0]
    assert_as_accurate_as_torch(
        kernels.cross_entropy(logits, targets, reduction="none", z_loss=0.1)[1:],
        by_definition(logits, targets, 0.0, 0.1, "none")[1:],
        by_definition(logits.double(), targets, 0.0, 0.1, "none")[1:],
    )


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_statistics(grad, module, device, monkeypatch):
    monkeypatch.setattr(kernels, "_chunk_bytes", lambda device: 1)
    monkeypatch.setattr(kernels, "CHUNK_MULTIPLE", 2)
    x, weight = torch.randn(7, 8, device=device, requires_grad=grad), torch.randn(40, 8, device=device)
    logits = (x @ weight.T).detach()
    targets = torch.where(torch.arange(7, device=device) % 2 == 0, logits.argmax(1), logits.argmin(1))
    targets[2] = -100
    loss, lse, top = module.linear_cross_entropy_with_statistics(x, weight, targets, z_loss=0.1)
    assert loss.requires_grad is grad
    assert not lse.requires_grad
    torch.testing.assert_close(loss, module.linear_cross_entropy(x, weight, targets, z_loss=0.1), rtol=0, atol=0)
    torch.testing.assert_close(lse, logits.logsumexp(1).where(targets != -100, 0.0))
    assert top.tolist() == [True, False, False, False, True, False, True]


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
def test_statistics_of_no_rows_and_of_nan(module, device):
    x, weight = torch.randn(2, 4, device=device), torch.randn(9, 4, device=device)
    targets = torch.zeros(2, dtype=torch.int64, device=device)
    weight[0] = torch.nan
    assert module.linear_cross_entropy_with_statistics(x, weight, targets)[2].tolist() == [False, False]
    _, lse, top = module.linear_cross_entropy_with_statistics(x[:0], weight, targets[:0])
    assert (lse.shape, top.shape, top.dtype) == ((0,), (0,), torch.bool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be from 0 to 1, got -0.1"),
        ({"z_loss": -1.0}, "z_loss must be at least 0 and finite, got -1.0"),
        ({"z_loss": float("nan")}, "z_loss must be at least 0 and finite, got nan"),
    ],
)
def test_bad_input(options, message, device):
    x, targets = torch.randn(3, 5, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=message):
        kernels.cross_entropy(x, targets, **options)
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(x, x, targets, **options)


@pytest.mark.parametrize(
    ("original", "changed"),
    [
        ("loss = loss * (1.0 - SMOOTHING) +", "loss = loss +"),
        ("tl.where(end_mask & used, x_end, 0.0)", "tl.where(end_mask & used, 0.0, 0.0)"),
        ("total += tl.sum(tl.where(mask, x, 0.0), axis=1)", "total += 0.0"),
        ("loss += lse * lse * Z_LOSS", "loss += lse * Z_LOSS"),
        ("lse * (2.0 * Z_LOSS) + 1.0", "lse * Z_LOSS + 1.0"),
        ("smooth = tl.where(used, scale * SMOOTHING / V, 0.0)", "smooth = scale * SMOOTHING / V"),
        ("dx -= smooth", "dx -= 0.0"),
        ("* factor - smooth\n", "* factor\n"),
        ("scale * (1.0 - SMOOTHING)", "scale"),
    ],
)
def test_mutants_are_caught(original, changed, device):
    if torch.cuda.is_available():
        pytest.skip("mutants run in the interpreter")
    _, broken = mutants(("_cross_entropy_rows", "cross_entropy"), original, changed)
    logits, targets = torch.randn(4, 603, device=device), some_targets(4, 603, device)
    with pytest.raises(AssertionError):
        compare(ours(broken), [logits], targets, (0.3, 0.02), "none")

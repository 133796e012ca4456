from __future__ import annotations

import functools
import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt_kernels.dropout import dropout_add

module = importlib.import_module("fastgpt_kernels.dropout")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def problem(shape, dtype, device, residual_dtype=None):
    x, residual, dy = (torch.randn(shape, device=device) for _ in range(3))
    residual_dtype = residual_dtype or dtype
    return x.to(dtype), residual.to(residual_dtype), dy.to(residual_dtype)


def run(op, x, residual, dy, **options):
    inputs = [t.detach().requires_grad_() for t in (x, residual)]
    y = op(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def compare(ours, x, residual, dy, p=0.5, seed=5):
    """Extract the mask, then replay forward and backward in float64 with the mask as a constant."""
    mask = ours(torch.ones_like(x), torch.zeros_like(residual), p, seed).double()
    kept = torch.tensor([0.0, 1 / (1 - p)], dtype=residual.dtype).double()
    assert torch.isin(mask.cpu(), kept).all()
    if mask.numel() >= 20 and p > 0:
        assert abs((mask != 0).double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5

    def plain(x, residual):
        return residual + (x * mask.to(x.dtype)).to(residual.dtype)

    exact = run(plain, x.double(), residual.double(), dy.double())
    theirs = run(plain, x, residual, dy)
    for name, o, t, e in zip(
        ("y", "dx", "dresidual"), run(ours, x, residual, dy, dropout_p=p, seed=seed), theirs, exact, strict=True
    ):
        assert_as_accurate_as_torch(o, t, e, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 1), (3, 5, 63), (2, 257), (3, 768)], ids=str)
def test_dropout_add(shape, dtype, device):
    problem_ = problem(shape, dtype, device)
    compare(dropout_add, *problem_)
    compare(dropout_add, *problem_, p=0.0)


def test_two_dtypes(device):
    compare(dropout_add, *problem((3, 66), torch.float16, device, torch.float32))
    compare(dropout_add, *problem((3, 66), torch.float32, device, torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    compare(dropout_add, *(LAYOUTS[layout](t) for t in problem((3, 5, 66), torch.float32, device)))


def test_draws(device):
    ones, zeros = torch.ones(50, 40, device=device), torch.zeros(50, 40, device=device)
    draw = functools.partial(dropout_add, ones, zeros, 0.2)
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    torch.manual_seed(3)
    drawn = draw()
    assert not torch.equal(drawn, draw())
    torch.manual_seed(3)
    assert torch.equal(drawn, draw())
    assert torch.equal(dropout_add(ones, ones, 1.0), ones)


def test_special_values(device):
    x, residual, _ = problem((3, 7), torch.float32, device)
    x[0, 1], residual[1, 2], x[2, :] = torch.nan, torch.inf, -torch.inf
    y = dropout_add(x, residual, 0.0)
    torch.testing.assert_close(y, x + residual, rtol=0, atol=0, equal_nan=True)
    assert dropout_add(x, residual, 0.5, 1)[0, 1].isnan()  # a dropped NaN shows, as in torch


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)], ids=str)
def test_empty(shape, device):
    compare(dropout_add, *problem(shape, torch.float32, device))


def test_gradcheck_opcheck_and_compile(device):
    x, residual, dy = problem((3, 5), torch.float64, device)
    op = functools.partial(dropout_add, dropout_p=0.5, seed=1)
    assert torch.autograd.gradcheck(op, (x.requires_grad_(), residual.requires_grad_()), fast_mode=True)
    x, residual, dy = problem((3, 5), torch.float32, device)
    for seed in (None, torch.ones(1, dtype=torch.int64, device=device)):
        torch.library.opcheck(module.dropout_add_rows.op, (x, residual, seed, 0.5, residual))
        torch.library.opcheck(module.dropout_add_rows.op, (dy, None, seed, 0.5, x))
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(run(compiled, x, residual, dy), run(op, x, residual, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_second_backward_raises(device):
    x, residual, _ = problem((3, 5), torch.float32, device)
    (dx,) = torch.autograd.grad(dropout_add(x.requires_grad_(), residual, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 8)}, r"one shape \[\.\.\., C\], got \[3, 8\] and \[3, 7\]"),
        ({"x": torch.ones(3, 7, dtype=torch.int32)}, "x must be float16"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {"x": torch.ones(3, 7), "residual": torch.ones(3, 7)} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dropout_add(**arguments)


def far_rows(ours, device):
    """Rows 2**30 elements apart, of which an int32 offset reaches two; memory never touched costs nothing."""
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((3, 64), (2**30, 1), 2**31)
    x.copy_(torch.randn(3, 64))
    storage[:64] = 1.0
    torch.testing.assert_close(ours.dropout_add(x, x), x + x, rtol=0, atol=0)


def test_offsets_beyond_int32(device):
    far_rows(module, device)


def test_int32_offsets_are_caught(device):
    with pytest.raises(AssertionError):
        far_rows(mutant("dropout", "// PARTS).to(tl.int64) * ROWS", "// PARTS) * ROWS"), device)


MUTANTS = {
    "residual dropped": ("y += tl.load(residual_ptr", "y = tl.load(residual_ptr"),
    "mask of another row": ("rows * ROW_COUNTERS + cols", "rows // 2 * ROW_COUNTERS + cols"),
    "no scale": ("M, dropout_p, keep_scale(dropout_p)", "M, dropout_p, 1.0"),
    "another mask in the backward": (
        "dx = dropout_add_rows(dtotal, None, seed,",
        "dx = dropout_add_rows(dtotal, None, seed + 1,",
    ),
    "stride of the other": ("residual_ptr + rows * stride_residual", "residual_ptr + rows * stride_x"),
    "gradient not masked": ("return dx, dtotal,", "return dtotal.to(like.dtype), dtotal,"),
}


def small_problem(ours, device):
    x, residual, dy = problem((6, 300), torch.float32, device)
    compare(ours.dropout_add, x, LAYOUTS["padded rows"](residual), dy)
    mask = ours.dropout_add(torch.ones_like(x), torch.zeros_like(x), 0.5, 5)
    assert len({tuple(row.tolist()) for row in mask}) == len(mask), "rows share a mask"


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("dropout", *MUTANTS[name]), device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1600])
def test_bfloat16_at_gpt2_shapes(width, device):
    compare(dropout_add, *problem((8, 1024, width), torch.bfloat16, device), p=0.1)


@pytest.mark.gpu
def test_repeats_are_bit_equal(device):
    x, residual, dy = problem((8, 1024, 768), torch.bfloat16, device)
    first = run(dropout_add, x, residual, dy, dropout_p=0.1, seed=1)
    for _ in range(250):
        for a, b in zip(run(dropout_add, x, residual, dy, dropout_p=0.1, seed=1), first, strict=True):
            assert torch.equal(a, b)

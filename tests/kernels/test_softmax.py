from __future__ import annotations

import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt import reference
from fastgpt_kernels.softmax import softmax

module = importlib.import_module("fastgpt_kernels.softmax")  # the package has a function of that name

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [torch.float32, torch.float16]
INF, NAN = float("inf"), float("nan")


def run(op, x, dy, **options):
    x = x.detach().requires_grad_()
    y = op(x, **options)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def compare(ours, x, dy, **options):
    exact = run(reference.softmax, x.double(), dy.double(), **options)
    theirs = run(reference.softmax, x, dy, **options)
    for name, o, t, e in zip(("y", "dx"), run(ours, x, dy, **options), theirs, exact, strict=True):
        assert_as_accurate_as_torch(o, t, e, name)


def problem(shape, dtype, device, scale=2.0):
    return (torch.randn(shape, device=device) * scale).to(dtype), torch.randn(shape, device=device).to(dtype)


SHAPES = [(1, 1), (3, 7), (2, 5, 63), (37, 257), (9, 1024), (2, 5000)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(shape, dtype, device):
    compare(softmax, *problem(shape, dtype, device), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 7), (3, 5, 63), (3, 257, 7), (2, 3, 2, 64)], ids=str)
def test_causal(shape, dtype, device):
    compare(softmax, *problem(shape, dtype, device), causal=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "causal"),
    [
        ((3, 50257), torch.float16, False),  # rows begin at all places of a 16-byte block
        ((2, 40000), torch.float32, True),
        ((2, 20001), torch.float16, False),  # only the backward is too wide for registers
        ((1, 1_000_000), torch.float16, False),
    ],
    ids=str,
)
def test_rows_wider_than_registers(shape, dtype, causal, device):
    compare(softmax, *problem(shape, dtype, device), scale=1.5, causal=causal)


@pytest.mark.parametrize("width", [9, 40, 257])
@pytest.mark.parametrize("causal", [True, False])
def test_wide_kernels_on_narrow_rows(width, causal, device, monkeypatch):
    """Every way in which edges, whole vectors and the causal end of a row can lie, on rows a step or less wide."""
    monkeypatch.setattr(module, "_FWD_REGISTER_COLUMNS", 0)
    monkeypatch.setattr(module, "_BWD_REGISTER_COLUMNS", 0)
    monkeypatch.setattr(module, "_WIDE_WARPS", 1)
    monkeypatch.setattr(module, "_WIDE_UNROLL", 1)
    for dtype in DTYPES:
        compare(softmax, *problem((13, width), dtype, device), causal=causal)
    x, dy = problem((13, width), torch.float32, device)
    compare(softmax, LAYOUTS["padded rows"](x), LAYOUTS["one row"](dy), causal=causal)


def test_only_x_strided_wide(device):
    x, dy = problem((3, 40001), torch.float16, device)
    compare(softmax, LAYOUTS["padded rows"](x), dy)
    compare(softmax, x, LAYOUTS["padded rows"](dy))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, dy = problem((3, 4, 66), torch.float32, device)
    compare(softmax, LAYOUTS[layout](x), dy, causal=True)
    compare(softmax, x, LAYOUTS[layout](dy))


@pytest.mark.parametrize("width", [63, 40000])
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [1e4, -1e4], [INF, NAN], [-INF, NAN]], ids=str)
def test_special_values(values, width, device):
    x, dy = problem((3, width), torch.float32, device)
    x[1, 5 : 5 + len(values)] = torch.tensor(values, device=device)
    compare(softmax, x, dy)


@pytest.mark.parametrize("width", [7, 40000])
def test_fully_masked_rows_are_zero(width, device):
    x, dy = problem((3, width), torch.float32, device)
    x[1] = -INF
    y, dx = run(softmax, x, dy)
    assert not y[1].any()
    assert not dx[1].any()
    assert_as_accurate_as_torch(y, reference.softmax(x), reference.softmax(x.double()), "y")
    x, dy = problem((5, 3), torch.float32, device)
    y, dx = run(softmax, x, dy, causal=True)  # the first two of five queries see none of three keys
    assert not y[:2].any()
    assert not dx[:2].any()


@pytest.mark.parametrize("width", [7, 40000])
def test_nothing_leaks_from_masked_places(width, device):
    x, dy = problem((2, width), torch.float32, device)
    y, dx = run(softmax, x, dy, causal=True)
    x[0, -1], dy[0, -1] = NAN, NAN
    for clean, dirty in zip((y, dx), run(softmax, x, dy, causal=True), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape, device):
    compare(softmax, *problem(shape, torch.float32, device), causal=True)


def test_gradcheck(device):
    x = torch.randn(2, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(x, scale=0.3, causal=True), (x,), fast_mode=True)
    compare(softmax, x.detach(), torch.randn_like(x), scale=0.3)


def test_opcheck(device):
    x, dy = problem((3, 5), torch.float32, device)
    torch.library.opcheck(module.softmax_fwd.op, (x, 0.5, True))
    torch.library.opcheck(module.softmax_bwd.op, (x, dy, 0.5, True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    compiled = torch.compile(softmax, backend="aot_eager", fullgraph=True)
    x, dy = problem((3, 5, 18), torch.float32, device)
    for ours, expected in zip(run(compiled, x, dy, causal=True), run(softmax, x, dy, causal=True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert softmax(torch.ones(3, 9, dtype=torch.float16, device=device)).dtype == torch.float16


def test_second_backward_raises(device):
    x = torch.randn(3, 9, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "causal", "message"),
    [
        (torch.ones(3, dtype=torch.int64), False, "x must be float16"),
        (torch.tensor(1.0), False, "x must have 1 dimensions or more, got 0"),
        (torch.ones(3), True, "x must have 2 dimensions or more, got 1"),
    ],
)
def test_bad_input(x, causal, message, device):
    with pytest.raises(ValueError, match=message):
        softmax(x.to(device), causal=causal)


def far_rows(ours, device, width):
    """Three rows 2**30 elements apart, of which an int32 offset reaches two: the third would wrap to before the first.

    The storage covers that place too, so that a mutant reads wrong values instead of crashing. Untouched memory costs nothing.
    """
    storage = torch.empty(2**32 + width, dtype=torch.float16, device=device)
    x = storage.as_strided((3, width), (2**30, 1), 2**31)
    x.copy_(torch.randn(3, width))
    storage[:width] = 1.0
    near = LAYOUTS["padded rows"](x)
    for far, expected in zip(run(ours.softmax, x, x), run(softmax, near, near), strict=True):
        torch.testing.assert_close(far, expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [64, 40000])
def test_offsets_beyond_int32(width, device):
    far_rows(module, device, width)


def small_problem(ours, device):
    compare(ours.softmax, *problem((2, 13, 300), torch.float32, device), scale=0.7, causal=True)
    compare(ours.softmax, *problem((3, 50257), torch.float16, device), scale=0.7)
    x, dy = problem((2, 40001), torch.float32, device)
    x[:, -1] = 30.0
    compare(ours.softmax, x, dy, causal=True)
    x[1] = -INF
    assert not ours.softmax(x)[1].any()


MUTANTS = {
    "mask off by one": ("rows.to(tl.int32) % T + 1", "rows.to(tl.int32) % T"),
    "aligned to the start": ("visible = N - T + rows", "visible = rows"),
    "a vector's tail not masked": ("s = tl.where(c + cols < visible, x", "s = tl.where(c + cols < readable, x"),
    "scale left out of the gradient": ("dx = scale * ys[c // CHUNK]", "dx = ys[c // CHUNK]"),
    "no dot product": ("(dys[c // CHUNK] - dot)", "dys[c // CHUNK]"),
    "old sum not rescaled": ("l *= tl.exp(m - shift)", "l *= 1.0"),
    "lanes not brought to one maximum": ("tl.sum(l * tl.exp(m - m_row), axis=0) + tl", "tl.sum(l, axis=0) + tl"),
    "edges left out of the sum": (" + tl.sum(edge_exps, axis=0)", ""),
    "edges left out of the dot product": (" + tl.sum(edge_y * edge_dy, axis=0)", ""),
    "first column lost": ("(i >= begin) & (cols", "(i > begin) & (cols"),
    "last column lost": ("(cols < row_end)", "(cols + 1 < row_end)"),
    "half-precision dot product": ("dot += y * dy\n", "dot += (y * dy).to(tl.float16).to(acc_dtype)\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("softmax", *MUTANTS[name]), device)


@pytest.mark.parametrize(
    "kernel", [(64, "x_ptr", "rows"), (64, "y_ptr", "rows"), (40000, "x_ptr", "row"), (40000, "y_ptr", "row")]
)
def test_int32_offsets_are_caught(kernel, device):
    width, pointer, rows = kernel
    before = f"if {pointer}.dtype.element_ty == tl.float64 else tl.float32\n    {rows} = tl.program_id(0)"
    with pytest.raises(AssertionError):
        far_rows(mutant("softmax", f"{before}.to(tl.int64)", before), device, width)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 1024), (512, 16384), (512, 50257), (8, 1_000_000)], ids=str)
def test_bfloat16_at_real_shapes(shape, device):
    compare(softmax, *problem(shape, torch.bfloat16, device), scale=0.125)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4099, 1024), (301, 50257)], ids=str)
def test_repeats_are_bit_equal(shape, device):
    x, dy = problem(shape, torch.bfloat16, device)
    first = run(softmax, x, dy)
    for _ in range(250):
        for a, b in zip(run(softmax, x, dy), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph(device):
    x = torch.randn(64, 1024, device=device)
    softmax(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = softmax(x)
    x.mul_(2.0)
    graph.replay()
    torch.testing.assert_close(y, torch.softmax(x, dim=-1))

from __future__ import annotations

import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt import reference
from fastgpt_kernels.gelu import bias_gelu, gelu

module = importlib.import_module("fastgpt_kernels.gelu")  # the package has a function of that name

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [torch.float32, torch.float16]
FORMS = ["tanh", "none"]


def run(op, inputs, dy, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = op(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def compare(ours, reference_op, inputs, dy, **options):
    exact = run(reference_op, [t.double() for t in inputs], dy.double(), **options)
    theirs = run(reference_op, inputs, dy, **options)
    names = ("y", "dx", "dbias")
    for name, o, t, e in zip(names, run(ours, inputs, dy, **options), theirs, exact, strict=False):
        assert_as_accurate_as_torch(o, t, e, name)


def compare_both(ours, x, bias, dy, **options):
    compare(ours.gelu, reference.gelu, [x], dy, **options)
    compare(ours.bias_gelu, reference.bias_gelu, [x, bias], dy, **options)


def problem(shape, dtype, device):
    x, dy = (torch.randn(shape, device=device) * 3).to(dtype), torch.randn(shape, device=device).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(dtype), dy


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 63), (37, 257), (300, 80)], ids=str)
def test_gelu(shape, dtype, approximate, device):
    compare_both(module, *problem(shape, dtype, device), approximate=approximate)


def test_scalar_and_bias_of_another_dtype(device):
    x = torch.tensor(0.7, device=device)
    compare(gelu, reference.gelu, [x], torch.ones_like(x))
    x, bias, dy = problem((5, 63), torch.float16, device)
    y, dx, dbias = run(bias_gelu, [x, bias.float()], dy)
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.float16, torch.float16, torch.float32)
    torch.testing.assert_close((y, dx, dbias.half()), tuple(run(bias_gelu, [x, bias], dy)), rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    x, bias, dy = problem((3, 4, 66), torch.float32, device)
    compare_both(module, LAYOUTS[layout](x), bias[:1].expand(66), LAYOUTS[layout](dy))


@pytest.mark.parametrize("approximate", FORMS)
def test_special_values(approximate, device):
    """Far into the tails, past overflow, NaN, and -inf. (What torch makes of +inf depends on its vector library.)"""
    x, _, dy = problem((1, 16), torch.float32, device)
    x[0] = torch.tensor(
        [0.0, -0.0, 5.5, -5.5, 9.0, -9.0, 20, -20, 1e4, -1e4, 1e10, -1e10, 1e30, -1e30, -torch.inf, torch.nan]
    )
    compare(gelu, reference.gelu, [x], dy, approximate=approximate)
    tail = gelu(torch.linspace(-5.5, -4.0, 64, device=device), approximate).double()
    exact = reference.gelu(torch.linspace(-5.5, -4.0, 64, dtype=torch.float64, device=device), approximate)
    # 1 + tanh cancels here in torch's formula; this one keeps its digits, and erf form no worse than torch
    assert ((tail - exact).abs() <= (1e-5 * exact.abs() if approximate == "tanh" else 1e-6)).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape, device):
    compare_both(module, *problem(shape, torch.float32, device))


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(approximate, device):
    x, bias, dy = problem((2, 3, 5), torch.float64, device)
    inputs = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: bias_gelu(x, b, approximate), inputs, fast_mode=True)
    compare(gelu, reference.gelu, [x], dy, approximate=approximate)


def test_opcheck(device):
    x, vector, dy = problem((3, 5), torch.float32, device)
    for bias in (None, vector):
        torch.library.opcheck(module.gelu_fwd.op, (x, bias, "gelu"))
        torch.library.opcheck(module.gelu_bwd.op, (dy, x, bias, "gelu"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    x, bias, dy = problem((3, 5, 18), torch.float32, device)
    compiled = torch.compile(bias_gelu, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(run(compiled, [x, bias], dy), run(bias_gelu, [x, bias], dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert gelu(torch.ones(3, 9, dtype=torch.float16, device=device)).dtype == torch.float16


def test_second_backward_raises(device):
    x = torch.randn(3, 9, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 9, dtype=torch.int64)}, "x must be float16"),
        ({"x": torch.tensor(1.0)}, "at least one dimension"),
        ({"bias": torch.ones(8)}, r"bias must be \[9\]"),
        ({"bias": torch.ones(9, device="meta")}, "bias on meta"),
        ({"approximate": "erf"}, "approximate must be"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {"x": torch.ones(3, 9), "bias": torch.ones(9)} | change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        bias_gelu(**arguments)


def far_rows(ours, device):
    """Three rows 2**30 elements apart, of which an int32 offset reaches two: the third would wrap to before the first.

    The storage covers that place too, so that a mutant reads wrong values instead of crashing. Untouched memory costs nothing.
    """
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((3, 64), (2**30, 1), 2**31)
    x.copy_(torch.randn(3, 64))
    storage[:64] = 1.0
    near = x.clone()
    for far, expected in zip(run(ours.gelu, [x], x), run(gelu, [near], near), strict=True):
        torch.testing.assert_close(far, expected, rtol=0, atol=0)


def test_offsets_beyond_int32(device):
    far_rows(module, device)


@pytest.mark.parametrize("name", ["rows = (tl.program_id(0) // PARTS)", "block = (tl.program_id(0) // PARTS)"])
def test_int32_offsets_are_caught(name, device):
    with pytest.raises(AssertionError):
        far_rows(mutant("gelu", f"{name}.to(tl.int64)", name), device)


def small_problem(ours, device):
    for approximate in FORMS:
        compare_both(ours, *problem((70, 300), torch.float32, device), approximate=approximate)


MUTANTS = {
    "forms exchanged": ('{"tanh": "gelu_tanh", "none": "gelu"}', '{"tanh": "gelu", "none": "gelu_tanh"}'),
    "bias forgotten in the gradient": ("            x += bias\n", "            x += 0.0 * bias\n"),
    "bias of the first columns": ("bias = tl.load(bias_ptr + cols,", "bias = tl.load(bias_ptr + cols % COLUMNS,"),
    "last tile lost": ("for tile in range(TILES):", "for tile in range(TILES - 1):"),
    "padding enters the bias gradient": ("            dbias += dx\n", "            dbias += dx + 1e-3\n"),
    "half-precision sum": ("            dbias += dx\n", "            dbias += dx.to(tl.float16).to(acc_dtype)\n"),
    "last partial sum lost": ("column_sums(partial, dbias)", "column_sums(partial[:-1], dbias)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("gelu", *MUTANTS[name]), device)


MATH_MUTANTS = {
    "slope without its square term": ("(square * _TANH_SLOPE_2 + _TANH_SLOPE_0)", "_TANH_SLOPE_0"),
    "1 - s forgotten": ("x * s * (tl.minimum(e, 1e30) * s)", "x * s * s"),
    "no density": (" + x * _RSQRT_2PI * tl.exp2(x * x * _MINUS_HALF_LOG2E)", ""),
    "a constant with four digits": ("tl.constexpr(-2.302208198144325)", "tl.constexpr(-2.302)"),
}


@pytest.mark.parametrize("name", MATH_MUTANTS)
def test_mutants_of_the_activations_are_caught(name, device, monkeypatch):
    broken = mutant("_math", *MATH_MUTANTS[name])
    copy = mutant(
        "gelu",
        "from ._math import activation, activation_grad",
        f"from {broken.__name__} import activation, activation_grad",
    )
    with pytest.raises(AssertionError):
        small_problem(copy, device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3072, 4096, 5120, 6400])
@pytest.mark.parametrize("approximate", FORMS)
def test_bfloat16_at_gpt2_shapes(width, approximate, device):
    compare_both(module, *problem((2048, width), torch.bfloat16, device), approximate=approximate)


@pytest.mark.gpu
def test_repeats_are_bit_equal(device):
    x, bias, dy = problem((4099, 3072), torch.bfloat16, device)
    first = run(bias_gelu, [x, bias], dy)
    for _ in range(250):
        for a, b in zip(run(bias_gelu, [x, bias], dy), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph(device):
    x = torch.randn(64, 3072, device=device)
    bias = torch.randn(3072, device=device)
    bias_gelu(x, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bias_gelu(x, bias)
    x.mul_(2.0)
    graph.replay()
    torch.testing.assert_close(y, reference.bias_gelu(x, bias))

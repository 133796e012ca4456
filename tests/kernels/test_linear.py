"""linear and mlp against float64, with torch in the same dtype as the yardstick; the kernels are gemm.py's."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from linear_problems import NAMES, compare, module, problem, run

from fastgpt import reference
from fastgpt_kernels import _launch, gemm
from fastgpt_kernels.linear import ACTIVATIONS, linear, mlp

# NumPy says under the interpreter what a GPU does in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(activation, dtype, device):
    compare("linear", *problem("linear", (70, 48, 80), dtype, device), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, dtype, device):
    compare("mlp", *problem("mlp", (70, 48, 80, 40), dtype, device), activation)


@pytest.fixture(params=["one kernel", "two"])
def summed_in(request, monkeypatch):
    """Where a residual is added: in the last product's kernel, or behind it."""
    monkeypatch.setattr(module, "sm_count", lambda _: 1 if request.param == "one kernel" else 10**6)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("float16", "float64"),
    ],
)
def test_residual(dtype, residual, summed_in, device):
    """mlp and the sum with what passed it by; y has the wider dtype, and each gradient its own input's."""
    inputs, grad = problem("mlp", (70, 48, 80, 40), getattr(torch, dtype), device)
    inputs.append(torch.randn(70, 40, device=device).to(getattr(torch, residual)))
    with _launch.record(90) as launches:
        module.mlp(*(t.to("meta") for t in inputs[:5]), residual=inputs[5].to("meta"))
    products = sum(launch.kernel.__name__ == "_gemm_kernel" for launch in launches)
    assert products == (2 if dtype == "float16" and residual != "float64" and summed_in == "one kernel" else 1)
    compare("mlp", inputs, grad, "gelu_tanh")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_residual(layout, summed_in, device):
    inputs, grad = problem("mlp", (0, 24, 16, 8), torch.float16, device, lead=(3, 5))
    inputs.append(torch.randn(3, 5, 8, device=device))
    view = LAYOUTS[layout]
    compare("mlp", inputs, view(grad), "relu", layout=lambda t: view(t) if t.dim() == 3 else t)


@pytest.mark.parametrize("frozen", [("residual",), ("x", "w1", "b1", "w2", "b2"), ("w2", "b2"), ("x", "w1", "b1")])
def test_a_residual_among_frozen_inputs(frozen, summed_in, device):
    inputs, grad = problem("mlp", (9, 24, 16, 8), torch.float16, device)
    inputs.append(torch.randn(9, 8, device=device))
    names = ("x", "w1", "b1", "w2", "b2", "residual")
    _, *everything = run(mlp, inputs, grad.float(), "gelu")
    leaves = [t.clone().requires_grad_(name not in frozen) for t, name in zip(inputs, names, strict=True)]
    mlp(*leaves[:5], "gelu", leaves[5]).backward(grad.float())
    for leaf, expected in zip(leaves, everything, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)


def test_bad_residuals(device):
    inputs, _ = problem("mlp", (9, 24, 16, 8), torch.float16, device)
    for residual, message in (
        (torch.ones(9, 16), r"residual must be \[9, 8\], got \[9, 16\]"),
        (torch.ones(8), r"residual must be \[9, 8\], got \[8\]"),
        (torch.ones(9, 8).long(), "residual must be float16, .* got torch.int64"),
        (torch.ones(9, 8, device="meta"), "residual on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            mlp(*inputs, residual=residual if residual.is_meta else residual.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 63, 257, 5), (1, 257, 3, 40)])
def test_odd_sizes(shape, dtype, device):
    compare("mlp", *problem("mlp", shape, dtype, device), "gelu_tanh")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    view = LAYOUTS[layout]

    def lay_out(t):
        return t if t.dim() == 1 or (t.dim() == 2 and "first two" in layout) else view(t)

    for name, shape in (("linear", (0, 24, 16)), ("mlp", (0, 24, 16, 8))):
        inputs, grad = problem(name, shape, torch.float16, device, lead=(3, 5))
        compare(name, inputs, view(grad), "gelu_tanh", layout=lay_out)


def test_descriptors_of_transposed_operands(device):
    """A row-major and a column-major operand are both described where they lie."""
    M, K, N = 24, 32, 16
    a, b = torch.randn(K, M, device=device).half().t(), torch.randn(N, K, device=device).half().t()
    assert gemm._orientation(a) is True
    assert gemm._orientation(b) is True
    assert gemm._orientation(b[1:]) is None
    assert gemm._orientation(a[:0]) is None
    out, _ = gemm.gemm_activation(a, b, None, "relu", False)
    assert_as_accurate_as_torch(out, (a @ b).relu(), (a.double() @ b.double()).relu())


@pytest.mark.parametrize("frozen", [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "weight")])
def test_frozen_inputs(frozen, device):
    """Who trains fewer parameters gets the same gradients for the rest."""
    layers = {"linear": (["x", "weight", "bias"], (9, 24, 16)), "mlp": (["x", "weight", "bias"] * 2, (9, 24, 16, 8))}
    for name, (kinds, shape) in layers.items():
        for activation in ("gelu_tanh", "relu") if name == "linear" else ("gelu",):
            inputs, grad = problem(name, shape, torch.float16, device)
            kinds[3:] = kinds[1:3]
            everything = run(getattr(module, name), inputs, grad, activation)[1:]
            leaves = [t.clone().requires_grad_(kind not in frozen) for t, kind in zip(inputs, kinds, strict=False)]
            getattr(module, name)(*leaves, activation).backward(grad)
            for leaf, expected in zip(leaves, everything, strict=True):
                assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)


def test_without_bias(device):
    (x, weight, _), grad = problem("linear", (9, 24, 16), torch.float16, device)
    zero = torch.zeros(16, device=device).half()
    for activation in (None, "gelu_tanh"):
        ours = run(lambda x, w, a: linear(x, w, activation=a), [x, weight], grad, activation)
        for a, b in zip(ours, run(linear, [x, weight, zero], grad, activation), strict=False):
            assert torch.equal(a, b)
    w2 = torch.randn(8, 16, device=device).half()
    ours = mlp(x, weight, None, w2, None)
    assert torch.equal(ours, mlp(x, weight, zero, w2, zero[:8]))


def test_non_finite_and_large_values(device):
    for dtype in (torch.float32, torch.float16):
        inputs, grad = problem("linear", (20, 24, 16), dtype, device)
        inputs[0][3, 5], inputs[0][7, 0], inputs[0][8, 1] = float("nan"), float("inf"), -float("inf")
        grad[11, 2] = float("inf")
        for activation in (None, "relu"):
            compare("linear", inputs, grad, activation)
        inputs, grad = problem("mlp", (20, 24, 16, 8), dtype, device)
        compare("mlp", [inputs[0] * 1e4, *inputs[1:]], grad, "gelu_tanh")


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_empty(lead, device):
    for name, shape in (("linear", (0, 24, 16)), ("mlp", (0, 24, 16, 8))):
        inputs, grad = problem(name, shape, torch.float16, device, lead=lead)
        for activation in (None, "gelu_tanh") if name == "linear" else ("relu",):
            y, dx, *rest = run(getattr(module, name), inputs, grad, activation)
            assert y.shape == grad.shape
            assert dx.shape == inputs[0].shape
            assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(rest, inputs[1:], strict=True))


def test_one_dimensional_input(device):
    inputs, grad = problem("linear", (0, 24, 16), torch.float16, device, lead=())
    compare("linear", inputs, grad, "gelu")


def test_gradcheck(device):
    for name, shape, activation in (
        ("linear", (3, 2, 2), None),
        ("linear", (2, 3, 2), "gelu"),
        ("mlp", (2, 2, 3, 2), "gelu_tanh"),
    ):
        inputs, _ = problem(name, shape, torch.float64, device)
        op = getattr(module, name)
        assert torch.autograd.gradcheck(lambda *t: op(*t, activation), [t.requires_grad_() for t in inputs])  # noqa: B023
    inputs += [torch.randn(2, 2, dtype=torch.float64, device=device)]
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: mlp(*t[:5], "gelu", t[5]), leaves)


def test_opcheck(device):
    (x, weight, bias), dy = problem("linear", (9, 24, 16), torch.float16, device)
    pre = torch.randn_like(dy)
    for op, arguments in (
        (gemm.gemm_activation.op, (x, weight.t(), bias, "gelu_tanh", True)),
        (gemm.gemm_activation.op, (x, weight.t(), None, "relu", False)),
        (gemm.gemm_residual.op, (x, weight.t(), bias, pre)),
        (gemm.gemm_residual.op, (x, weight.t(), None, pre.float())),
        (gemm.gemm_gradient.op, (x, weight.t(), pre, "relu", torch.float16)),
        (gemm.gemm_gradient.op, (x, weight.t(), pre, "relu", torch.float32)),
        (gemm.gemm_gradient.op, (x, weight.t(), pre, "gelu", None)),
        (module.activation_backward.op, (dy, pre, "gelu", torch.float16, torch.float16)),
        (module.activation_backward.op, (dy, None, None, None, torch.float32)),
        (module.activation_backward.op, (dy.float(), None, None, torch.float16, None)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    def op(x, w1, b1, w2, b2):
        return linear(mlp(x, w1, b1, w2, b2, "gelu_tanh", x), w1, b1, "relu")

    inputs, _ = problem("mlp", (0, 24, 16, 24), torch.float16, device, lead=(3, 3))
    grad = torch.randn(3, 3, 16, device=device)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    results = [run(lambda *t, f=f: f(*t[:-1]), inputs, grad, None) for f in (compiled, op)]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_autocast(device):
    """Weights are rounded for the products as torch has it, and gradients come in their own dtype; biases stay as they are."""
    inputs, grad = problem("mlp", (9, 24, 16, 8), torch.float32, device)
    inputs = [t.half().float() if t.dim() == 1 else t for t in inputs]
    halves = [t.half() for t in inputs]
    expected = run(mlp, halves, grad.half(), "gelu_tanh")
    with torch.autocast(device.type, dtype=torch.float16):
        ours = run(mlp, [inputs[0].half(), *inputs[1:]], grad, "gelu_tanh")
        assert linear(*inputs[:3]).dtype == torch.float16
        assert linear(*(t.double() for t in inputs[:3])).dtype == torch.float64
    assert [t.dtype for t in ours] == [torch.float16] * 2 + [torch.float32] * 4
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.half(), b)


def test_residual_under_autocast(summed_in, device):
    """What a block of a GPT does: an fp32 residual, a branch in half precision. Gradients err at most twice as torch's do."""
    inputs, grad = problem("mlp", (70, 48, 80, 48), torch.float32, device)
    inputs = [inputs[0].half(), *inputs[1:], torch.randn(70, 48, device=device)]
    with torch.autocast(device.type, dtype=torch.float16):
        ours = run(mlp, inputs, grad, "gelu_tanh")
        plain = run(reference.mlp, inputs, grad, "gelu_tanh")
    exact = run(reference.mlp, inputs, grad, "gelu_tanh", torch.float64)
    for name, *three in zip(NAMES["mlp"], ours, plain, exact, strict=True):
        assert_as_accurate_as_torch(*three, name)


def test_second_backward_raises(device):
    for name, shape in (("linear", (5, 8, 8)), ("mlp", (5, 8, 8, 8))):
        inputs, _ = problem(name, shape, torch.float16, device)
        leaf = inputs[0].requires_grad_()
        y = getattr(module, name)(*inputs, "gelu_tanh")
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()


def test_changed_output_is_noticed(device):
    """ReLU's backward reads the output: writing over it raises instead of giving a wrong gradient."""
    (x, weight, bias), grad = problem("linear", (5, 8, 8), torch.float16, device)
    y = linear(x.requires_grad_(), weight, bias, "relu")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


ONES = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5)}, r"weight must be \[N, 5\].*got \[5, 4\]"),
        ({"x": torch.tensor(1.0)}, r"x must be \[..., K\], got a scalar"),
        ({"x": torch.ones(3, 4).half()}, "weight must have x's dtype torch.float16, got torch.float32"),
        ({"x": torch.ones(3, 4).long()}, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"weight": torch.ones(2, 5, 4)}, r"weight must be \[N, 4\].*got \[2, 5, 4\]"),
        ({"weight": torch.ones(0, 4), "bias": None}, r"both positive, got \[0, 4\]"),
        ({"bias": torch.ones(4)}, r"bias must be \[5\], got \[4\]"),
        ({"bias": torch.ones(5).double()}, "bias must have x's dtype torch.float32, got torch.float64"),
        ({"activation": "tanh"}, "activation must be None or one of .*got 'tanh'"),
        ({"weight": torch.ones(5, 4, device="meta")}, "weight on meta"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {
        k: t.to(device) if isinstance(t, torch.Tensor) and t.device.type == "cpu" else t
        for k, t in (ONES | change).items()
    }
    with pytest.raises(ValueError, match=message):
        linear(**arguments)


def test_bad_input_to_mlp(device):
    x, w1, b1 = (t.to(device) for t in ONES.values())
    for arguments, message in (
        ((x, w1, b1, w1, None), r"w2 must be \[N, 5\].*got \[5, 4\]"),
        ((x, w1, b1, w1.t(), b1), r"b2 must be \[4\], got \[5\]"),
        ((x, w1, b1, w1.t(), None, None), "activation must be one of .*got None"),
    ):
        with pytest.raises(ValueError, match=message):
            mlp(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpt2_shapes(dtype, width, device):
    compare("mlp", *problem("mlp", (4096, width, 4 * width, width), dtype, device), "gelu_tanh")
    compare("linear", *problem("linear", (4096, width, 4 * width), dtype, device), "gelu")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 100, 1000, 2049])
@pytest.mark.parametrize("width", [768, 770, 257])
def test_bfloat16_rows(rows, width, device):
    compare("mlp", *problem("mlp", (rows, width, 2 * width, width), torch.bfloat16, device), "gelu_tanh")
    compare("linear", *problem("linear", (rows, width, 3 * width), torch.bfloat16, device), "relu")

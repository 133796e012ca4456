"""linear and mlp against float64, with torch in the same dtype as the yardstick; the kernels are gemm.py's."""

from __future__ import annotations

import importlib
from itertools import pairwise

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt import reference
from fastgpt_kernels import _launch, gemm
from fastgpt_kernels.gemm import Blocks
from fastgpt_kernels.linear import ACTIVATIONS, linear, mlp

module = importlib.import_module("fastgpt_kernels.linear")  # the package has a function of that name

# NumPy says under the interpreter what a GPU does in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

NAMES = {"linear": ("y", "dx", "dweight", "dbias"), "mlp": ("y", "dx", "dw1", "db1", "dw2", "db2")}


def problem(op, shape, dtype, device, lead=None):
    """Inputs and incoming gradient: of linear [M, K] -> [M, N] for shape (M, K, N), of mlp with a last width for four."""
    M, *widths = shape
    inputs = [torch.randn(*(lead or (M,)), widths[0])]
    for width, out in pairwise(widths):
        inputs += [torch.randn(out, width) / width**0.5, torch.randn(out)]
    grad = torch.randn(*(lead or (M,)), widths[-1])
    assert len(widths) == (2 if op == "linear" else 3)
    return [t.to(device, dtype) for t in inputs], grad.to(device, dtype)


def run(op, inputs, grad, activation, dtype=None, layout=None):
    """The op's result and the gradients of its inputs, the leaves in the layout of their `inputs`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    laid_out = [layout(t) for t in leaves] if layout else leaves
    y = op(*laid_out, activation)
    y.backward(grad.to(y.dtype))
    return y, *(t.grad for t in leaves)


def compare(name, inputs, grad, activation, ours=module, layout=None):
    function, expected = getattr(ours, name), getattr(reference, name)
    results = (
        run(function, inputs, grad, activation, layout=layout),
        run(expected, inputs, grad, activation, layout=layout),
        run(expected, inputs, grad, activation, torch.float64, layout=layout),
    )
    for value, *tensors in zip(NAMES[name], *results, strict=True):
        assert_as_accurate_as_torch(*tensors, value)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many tiles, parts of tiles and programs of several tiles at sizes that the interpreter can bear."""

    def use(parts=2, kernels=gemm, ops=module):
        block = Blocks(16, 16 * max(parts, 2), 16, warps=4, stages=3, parts=parts)
        monkeypatch.setattr(kernels, "gemm_blocks", lambda *_: block)
        monkeypatch.setattr(ops, "COLUMNS", 32)
        monkeypatch.setattr(ops, "PROGRAMS_PER_SM", 1)
        if not torch.cuda.is_available():
            monkeypatch.setattr(kernels, "sm_count", lambda _: 3)

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(activation, dtype, device):
    compare("linear", *problem("linear", (70, 48, 80), dtype, device), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, dtype, device):
    compare("mlp", *problem("mlp", (70, 48, 80, 40), dtype, device), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 63, 257, 5), (1, 257, 3, 40)])
def test_odd_sizes(shape, dtype, device):
    compare("mlp", *problem("mlp", shape, dtype, device), "gelu_tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_many_tiles(parts, dtype, small_blocks, device):
    small_blocks(parts)
    compare("mlp", *problem("mlp", (40, 32, 72, 48), dtype, device), "gelu_tanh")


def test_tf32_follows_torch(small_blocks, monkeypatch, device):
    """Of fp32, only what may be rounded to tf32 goes through tensor cores; the interpreter rounds neither way."""
    small_blocks()
    modes, start = [], _launch.launch
    monkeypatch.setattr(
        gemm, "launch", lambda *a, **k: (modes.append((k.get("PRECISION"), k.get("DESCRIPTORS"))), start(*a, **k))
    )
    inputs, grad = problem("linear", (20, 32, 48), torch.float32, device)
    precision = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", ("ieee", False)), ("high", ("tf32", True))):
            torch.set_float32_matmul_precision(setting)
            compare("linear", inputs, grad, "relu")
            if device.type == "cpu":
                assert {mode for mode in modes if mode[0]} == {expected}
            modes.clear()
    finally:
        torch.set_float32_matmul_precision(precision)


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


def test_opcheck(device):
    (x, weight, bias), dy = problem("linear", (9, 24, 16), torch.float16, device)
    pre = torch.randn_like(dy)
    for op, arguments in (
        (gemm.gemm_activation.op, (x, weight.t(), bias, "gelu_tanh", True)),
        (gemm.gemm_activation.op, (x, weight.t(), None, "relu", False)),
        (gemm.gemm_gradient.op, (x, weight.t(), pre, "relu", True)),
        (gemm.gemm_gradient.op, (x, weight.t(), pre, "gelu", False)),
        (module.activation_backward.op, (dy, pre, "gelu", True)),
        (module.activation_backward.op, (dy, None, None, True)),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    def op(x, w1, b1, w2, b2):
        return linear(mlp(x, w1, b1, w2, b2, "gelu_tanh"), w1, b1, "relu")

    inputs, _ = problem("mlp", (0, 24, 16, 24), torch.float16, device, lead=(3, 3))
    grad = torch.randn(3, 3, 16, device=device)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    results = [run(lambda *t, f=f: f(*t[:-1]), inputs, grad, None) for f in (compiled, op)]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_autocast(device):
    inputs, grad = problem("mlp", (9, 24, 16, 8), torch.float32, device)
    halves = [t.half() for t in inputs]
    expected = run(mlp, halves, grad.half(), "gelu_tanh")
    with torch.autocast(device.type, dtype=torch.float16):
        ours = run(mlp, [inputs[0].half(), *inputs[1:]], grad, "gelu_tanh")
        assert linear(*inputs[:3]).dtype == torch.float16
        assert linear(*(t.double() for t in inputs[:3])).dtype == torch.float64
    assert [t.dtype for t in ours] == [torch.float16] * 2 + [torch.float32] * 4
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.half(), b)


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


def far_rows(ours, device):
    """Rows beyond the reach of int32 offsets; where those would wrap to, the storage holds other values."""
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    far = storage.as_strided((3, 24), (2**30, 1), 2**31)
    far.copy_(torch.randn(3, 24))
    storage[:24] = 1.0
    near = far.clone()
    weight = torch.randn(16, 24, device=device).half()
    for a, b in (((far, weight.t()), (near, weight.t())), ((weight, far.t()), (weight, near.t()))):
        assert torch.equal(
            ours.gemm_activation(*a, None, "relu", False)[0], ours.gemm_activation(*b, None, "relu", False)[0]
        )


@pytest.mark.parametrize("descriptors", [True, False])
def test_offsets_beyond_int32(descriptors, monkeypatch, device):
    if not descriptors:
        monkeypatch.setattr(gemm, "_orientation", lambda _: None)
    far_rows(gemm, device)


def kernels_of(arch, name, shape, dtype=torch.bfloat16, activation="gelu_tanh"):
    """What a forward and backward pass launches on an architecture."""
    with _launch.record(arch) as launches:
        M, *widths = shape
        inputs = [torch.empty(M, widths[0], dtype=dtype, device="meta", requires_grad=True)]
        for width, out in pairwise(widths):
            inputs += [
                torch.empty(size, dtype=dtype, device="meta", requires_grad=True) for size in ((out, width), out)
            ]
        y = getattr(module, name)(*inputs, activation)
        y.backward(torch.empty_like(y))
    return launches


def test_launches_of_mlp():
    """Two products have an epilogue, for the activation and for its derivative with db1; db2 is a pass, the rest is torch's."""
    launches = kernels_of(90, "mlp", (16384, 768, 3072, 768))
    names = [launch.kernel.__name__ for launch in launches]
    sums = "_column_sums_kernel"
    assert names == ["_gemm_kernel", "_activation_backward_kernel", sums, "_gemm_kernel", sums]
    assert all(launch.kwargs["DESCRIPTORS"] for launch in launches if "gemm" in launch.kernel.__name__)
    assert launches[0].grid == (2 * 132,)


def test_nothing_is_kept_without_gradients(device):
    inputs, _ = problem("mlp", (9, 24, 16, 8), torch.float16, device)
    with_gradients = mlp(*(t.clone().requires_grad_() for t in inputs))
    with torch.no_grad(), _launch.record(90) as launches:
        mlp(*(t.clone().requires_grad_() for t in inputs))
    assert [launch.kwargs["SAVE_PRE"] for launch in launches] == [False]
    with torch.no_grad():
        assert torch.equal(mlp(*inputs), with_gradients)
        assert torch.equal(linear(*inputs[:3], "gelu"), linear(*inputs[:2], inputs[2].requires_grad_(), "gelu"))


@pytest.mark.parametrize(
    ("arch", "width", "descriptors"), [(80, 768, False), (90, 768, True), (90, 770, False), (120, 768, False)]
)
def test_descriptors_where_they_can_be(arch, width, descriptors):
    launches = kernels_of(arch, "linear", (2048, width, width))
    assert {launch.kwargs.get("DESCRIPTORS", descriptors) for launch in launches} == {descriptors}


def check_gelu(ours):
    compare("linear", *problem("linear", (70, 24, 40), torch.float32, "cpu"), "gelu", ours)


def check_single(ours):
    compare("linear", *problem("linear", (40, 24, 72), torch.float32, "cpu"), "relu", ours)


def check_mlp(ours):
    compare("mlp", *problem("mlp", (40, 32, 72, 48), torch.float16, "cpu"), "gelu_tanh", ours)


def check_gradient_layout(ours):
    inputs, grad = problem("linear", (40, 24, 72), torch.float32, "cpu")
    compare("linear", inputs, LAYOUTS["last two transposed"](grad), "gelu", ours)


MUTANTS = {
    "no bias": ("gemm", "tile += tl.load(bias_ptr", "tile += 0.0 * tl.load(bias_ptr", check_single),
    "half precision accumulator": (
        "gemm",
        "            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)",
        "            acc = tl.dot(a_tile, b_tile, acc, out_dtype=ACC).to(tl.float16).to(ACC)",
        check_gelu,
    ),
    "pre after the activation": ("gemm", "_store(pre, tile,", "_store(pre, _activation(tile, ACTIVATION),", check_mlp),
    "parts in each other's place": ("gemm", "n + part * PART_N", "n + (PARTS - 1 - part) * PART_N", check_single),
    "first part's derivative": ("gemm", "first + PART_N, M, N, N, 1", "n, M, N, N, 1", check_mlp),
    "no derivative": ("gemm", "tile = through_activation(tile, x.to(ACC), ACTIVATION)", "pass", check_mlp),
    "column sums of the first tile": (
        "gemm",
        "* N + cols, sums, mask=cols < N)",
        "* N + cols, sums, mask=(cols < N) & (tile_m == 0))",
        check_mlp,
    ),
    "rows for columns": ("gemm", "within % rows, within // rows", "within // rows, within % rows", check_gelu),
    "no derivative alone": ("linear", "dpre = through_activation(dpre, pre.to(ACC), ACTIVATION)", "pass", check_single),
    "column stride of dy": ("linear", "[None, :] * stride_dyn", "[None, :]", check_gradient_layout),
    "bias gradient of some rows": ("linear", "sums += dpre", "sums = dpre", check_single),
}


def broken_module(monkeypatch, source, original, changed):
    """A copy of linear.py with the change in it, or the original on a copy of gemm.py with the change."""
    copy = mutant(source, original, changed)
    if source == "linear":
        return copy, gemm
    for name in ("gemm_activation", "gemm_gradient"):
        monkeypatch.setattr(module, name, getattr(copy, name))
    return module, copy


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, monkeypatch, small_blocks):
    if torch.cuda.is_available():
        pytest.skip("mutants run in the interpreter")
    *change, check = MUTANTS[name]
    ours, kernels = broken_module(monkeypatch, *change)
    small_blocks(2, kernels, ours)
    with pytest.raises(AssertionError):
        check(ours)


def test_int32_offsets_are_caught(monkeypatch, device):
    broken = mutant("gemm", "rows.to(tl.int64)[:, None] * stride_i", "rows[:, None] * stride_i")
    monkeypatch.setattr(broken, "_orientation", lambda _: None)
    with pytest.raises(AssertionError):
        far_rows(broken, device)


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


@pytest.mark.gpu
def test_bit_equal_repeats(device):
    inputs, grad = problem("mlp", (8192, 768, 3072, 768), torch.bfloat16, device)
    expected = run(mlp, inputs, grad, "gelu_tanh")
    for _ in range(250):
        for a, b in zip(run(mlp, inputs, grad, "gelu_tanh"), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph(device):
    inputs, grad = problem("mlp", (512, 768, 3072, 768), torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = torch.autograd.grad(mlp(*leaves), leaves, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(mlp(*leaves), leaves, grad)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)

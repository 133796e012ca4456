"""Tiles, what linear and mlp launch, offsets beyond int32, and mutants that are caught."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from layouts import LAYOUTS
from linear_problems import compare, module, problem, run
from mutants import mutant

from fastgpt_kernels import _launch, gemm
from fastgpt_kernels.gemm import Blocks
from fastgpt_kernels.linear import linear, mlp

# NumPy says under the interpreter what a GPU does in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.fixture
def small_blocks(monkeypatch):
    """Many tiles, parts of tiles and programs of several tiles at sizes that the interpreter can bear."""

    def use(parts=2, kernels=gemm, ops=module):
        block = Blocks(16, 16 * max(parts, 2), 16, warps=4, stages=3, parts=parts)
        monkeypatch.setattr(kernels, "gemm_blocks", lambda *_: block)
        monkeypatch.setattr(ops, "sm_count", lambda _: 1)  # large tiles enough to add a residual in
        monkeypatch.setattr(ops, "COLUMNS", 32)
        monkeypatch.setattr(ops, "PROGRAMS_PER_SM", 1)
        if not torch.cuda.is_available():
            monkeypatch.setattr(kernels, "sm_count", lambda _: 3)

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_many_tiles(parts, dtype, small_blocks, device):
    small_blocks(parts)
    compare("mlp", *problem("mlp", (40, 32, 72, 48), dtype, device), "gelu_tanh")
    check_residual(module, dtype, device)


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


def check_residual(ours, dtype=torch.float16, device="cpu"):
    inputs, grad = problem("mlp", (40, 32, 72, 48), dtype, device)
    compare("mlp", [*inputs, 100 * torch.randn(40, 48, device=device)], grad, "gelu_tanh", ours)


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
    "no residual": ("gemm", "tile += x.to(ACC)", "pass", check_residual),
    "first part's residual": ("gemm", "first + PART_N, M, N, N, 1", "n, M, N, N, 1", check_residual),
    "a residual in half precision": ("gemm", "tile += x.to(ACC)", "tile += x.to(tl.float16).to(ACC)", check_residual),
    "no bias beside a residual": ("gemm", "tile += tl.load(bias_ptr", "tile += 0.0 * tl.load(bias_ptr", check_residual),
    "no rounded gradient": (
        "linear",
        "tl.store(dpre_ptr + offsets, dpre",
        "tl.store(dpre_ptr + offsets, 0 * dpre",
        check_residual,
    ),
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
    for name in ("gemm_activation", "gemm_residual", "gemm_gradient"):
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

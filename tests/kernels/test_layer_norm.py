from __future__ import annotations

import functools
import importlib

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt import reference
from fastgpt_kernels.layer_norm import add_layer_norm, layer_norm

module = importlib.import_module("fastgpt_kernels.layer_norm")  # the package's attribute of that name is the function

module = importlib.import_module("fastgpt_kernels.layer_norm")  # the package has a function of that name

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [torch.float32, torch.float16]


def run(op, inputs, grads, **options):
    """The outputs of op(*inputs) and the gradients of its inputs, None where there is none."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = op(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    needed = [t for t in inputs if t is not None]
    return [*outputs, *torch.autograd.grad([o for o, _ in used], needed, [g for _, g in used], allow_unused=True)]


def compare(ours, reference_op, inputs, grads, **options):
    exact = run(reference_op, [double(t) for t in inputs], [double(g) for g in grads], **options)
    theirs = run(reference_op, inputs, grads, **options)
    for i, (o, t, e) in enumerate(zip(run(ours, inputs, grads, **options), theirs, exact, strict=True)):
        assert_as_accurate_as_torch(o, t, e, f"result {i}")


def double(t):
    return None if t is None else t.double()


def randn(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def problem(shape, dtype, device, bias=True, weight_dtype=None):
    """x, weight, bias and dy."""
    weight = randn(shape[-1], dtype=weight_dtype or dtype, device=device)
    x, dy = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device)
    return [x, weight, torch.randn_like(weight) if bias else None], [dy]


SHAPES = [(1, 1), (3, 7), (2, 5, 63), (37, 257), (9, 768), (3, 1600)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in DTYPES] + [((2, 2500), torch.float32), ((1, 16384), torch.float16)],
    ids=str,
)
def test_layer_norm(shape, dtype, device):
    inputs, grads = problem(shape, dtype, device)
    compare(layer_norm, reference.layer_norm, inputs, grads)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_another_dtype_or_without_bias(bias, weight_dtype, device):
    inputs, grads = problem((5, 63), torch.float16, device, bias, weight_dtype)
    compare(layer_norm, reference.layer_norm, inputs, grads, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["both", "y", "total"])
@pytest.mark.parametrize("shape", [(2, 5, 63), (5, 700)], ids=str)
def test_add_layer_norm(shape, used, dtype, device):
    (x, weight, bias), (dy,) = problem(shape, dtype, device)
    grads = [dy if used != "total" else None, torch.randn_like(dy) if used != "y" else None]
    compare_added(add_layer_norm, [x, torch.randn_like(x), weight, bias], grads)


def compare_added(ours, inputs, grads):
    """The sum is rounded before it is normalised, in torch as here: the exact y and gradients are those of the rounded sum."""
    x, residual, weight, bias = inputs
    outputs = run(ours, inputs, grads)
    total = outputs[1].detach()
    assert_as_accurate_as_torch(
        total, (residual + x.to(residual.dtype)).detach(), residual.double() + x.double(), "total"
    )
    zero = torch.zeros_like(residual)
    exact = run(reference.add_layer_norm, [double(t) for t in (zero, total, weight, bias)], [double(g) for g in grads])
    theirs = run(reference.add_layer_norm, [zero, total, weight, bias], grads)
    for i, (o, t, e) in enumerate(zip(outputs, theirs, exact, strict=True)):
        if o is None or t is None:
            assert o is None or not o.any(), f"result {i} doesn't depend on the outputs used"
            continue
        assert_as_accurate_as_torch(o, t.to(o.dtype), e, f"result {i}")


def test_residual_of_another_dtype(device):
    (x, weight, bias), (dy,) = problem((5, 63), torch.float16, device)
    residual = randn(5, 63, device=device)
    compare_added(add_layer_norm, [x, residual, weight.float(), bias.float()], [dy.float(), torch.randn_like(residual)])
    y, total = add_layer_norm(x, residual, weight, bias)
    assert y.dtype == total.dtype == torch.float32


def dropout_problem(ours, shape, dtype, device, p=0.5, seed=11):
    """Extract the mask, then replay forward and backward in float64 with the mask as a constant."""
    (x, weight, bias), (dy,) = problem(shape, dtype, device)
    residual, dtotal = torch.randn_like(x), torch.randn_like(x)
    _, mask = ours(torch.ones_like(x), torch.zeros_like(x), weight, bias, dropout_p=p, seed=seed)
    torch.testing.assert_close(mask.unique().double().cpu(), torch.tensor([0.0, 1 / (1 - p)]).double())
    outputs = run(ours, [x, residual, weight, bias], [dy, dtotal], dropout_p=p, seed=seed)

    def replayed(x, residual, weight, bias):
        return reference.add_layer_norm(x * mask.to(x.dtype), residual, weight, bias)

    exact = run(replayed, [double(t) for t in (x, residual, weight, bias)], [double(dy), double(dtotal)])
    theirs = run(replayed, [x, residual, weight, bias], [dy, dtotal])
    for i, (o, t, e) in enumerate(zip(outputs, theirs, exact, strict=True)):
        assert_as_accurate_as_torch(o, t, e, f"result {i}")
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 63), (2, 5, 300)], ids=str)
def test_dropout_replayed(shape, dtype, device):
    dropout_problem(add_layer_norm, shape, dtype, device)


def test_dropout_mask(device):
    def mask(shape=(32, 129), p=0.2, seed=None):
        ones = torch.ones(shape, device=device)
        return add_layer_norm(ones, ones * 0, ones[0], None, dropout_p=p, seed=seed)[1] != 0

    first = mask(seed=1)
    assert torch.equal(first, mask(seed=1))
    # the mask of an element depends on its row and column alone
    assert torch.equal(first[:3], mask((3, 129), seed=1))
    other = mask(seed=2)
    n = first.numel()
    for kept in (first, other, first[1:], first[:, 1:], first[:, ::4], first[::2]):
        assert abs(kept.double().mean().item() - 0.8) < 4 * (0.16 / kept.numel()) ** 0.5
    # independent of another seed, of the row below, and of the neighbours that share a counter
    for a, b in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs((a & b).double().mean().item() - 0.64) < 5 * (0.64 * 0.36 / n) ** 0.5
    torch.manual_seed(3)
    drawn = mask()
    assert not torch.equal(drawn, mask())
    torch.manual_seed(3)
    assert torch.equal(drawn, mask())
    assert not mask(p=1.0).any()
    assert mask(p=0.0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    (x, weight, bias), (dy,) = problem((3, 4, 66), torch.float32, device)
    weight = weight[:1].expand(66)
    there = LAYOUTS[layout]
    compare(layer_norm, reference.layer_norm, [there(x), weight, bias], [there(dy)])
    compare_added(add_layer_norm, [x, there(x), weight, bias], [dy, there(dy)])


def test_gradient_of_a_sum(device):
    (x, weight, bias), _ = problem((5, 63), torch.float32, device)
    compare(layer_norm, reference.layer_norm, [x, weight, bias], [torch.ones((), device=device).expand(5, 63)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_special_values(value, device):
    inputs, grads = problem((5, 63), torch.float32, device)
    inputs[0][2, 7] = value
    compare(layer_norm, reference.layer_norm, inputs, grads)


def test_large_mean(device):
    inputs, grads = problem((5, 257), torch.float32, device)
    compare(layer_norm, reference.layer_norm, [inputs[0] + 1e4, *inputs[1:]], grads)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 5)], ids=str)
def test_empty(shape, device):
    inputs, grads = problem(shape, torch.float32, device)
    compare(layer_norm, reference.layer_norm, inputs, grads)
    x, weight, bias = inputs
    compare(add_layer_norm, reference.add_layer_norm, [x, x.clone(), weight, bias], grads * 2)


@pytest.mark.parametrize("op", ["alone", "added", "beside"])
def test_a_norm_of_another_dtype_is_the_norm_cast(op, device):
    """As autocast casts it, forward and backward, but in the same pass."""
    (x, weight, bias), (dy,) = problem((7, 700), torch.float32, device)
    residual, dtotal = randn(7, 700, device=device), randn(7, 700, device=device)
    inputs = {"alone": [x], "added": [x, residual], "beside": [residual]}[op] + [weight, bias]

    def norm(*tensors, dtype=None):
        if op == "alone":
            return layer_norm(*tensors, dtype=dtype)
        return add_layer_norm(*([None] if op == "beside" else []), *tensors, dtype=dtype)

    def cast(*tensors):
        outputs = norm(*tensors)
        return outputs.half() if op == "alone" else (outputs[0].half(), outputs[1])

    grads = [dy.half()] + ([] if op == "alone" else [dtotal])
    for ours, expected in zip(run(norm, inputs, grads, dtype=torch.float16), run(cast, inputs, grads), strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("used", ["both", "y", "total"])
def test_a_norm_beside_its_input_adds_their_gradients(used, device):
    (x, weight, bias), (dy,) = problem((5, 63), torch.float32, device)
    grads = [dy if used != "total" else None, torch.randn_like(dy) if used != "y" else None]

    def beside(op):
        return lambda x, weight, bias: op(None, x, weight, bias)

    if used == "total":
        _, total = add_layer_norm(None, x.requires_grad_(), weight, bias)
        (dx,) = torch.autograd.grad(total, x, grads[1])
        assert torch.equal(dx, grads[1])
    else:
        compare(beside(add_layer_norm), beside(reference.add_layer_norm), [x, weight, bias], grads)


def test_gradcheck(device):
    x, residual = torch.randn(2, 2, 5, 9, dtype=torch.float64, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 9, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias), fast_mode=True)
    added = functools.partial(add_layer_norm, dropout_p=0.4, seed=5)
    assert torch.autograd.gradcheck(added, (x, residual, weight, None), fast_mode=True)


def test_opcheck(device):
    x, weight = torch.randn(5, 9, device=device), torch.randn(9, device=device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    forward = [
        (x, None, weight, weight, 1e-5, 0.0, None, torch.float16),
        (x, x, weight, None, 1e-5, 0.5, seed, None),
    ]
    for arguments in forward:
        torch.library.opcheck(module.layer_norm_fwd.op, arguments)
    mean = torch.randn(5, device=device)
    for arguments in [
        (x, None, x, weight, weight, mean, mean, 0.0, None, None),
        (x, x, x, weight, None, mean, mean, 0.5, seed, torch.float16),
    ]:
        torch.library.opcheck(module.layer_norm_bwd.op, arguments)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    def block(x, residual, weight, bias):
        y, total = add_layer_norm(x, residual, weight, bias, dropout_p=0.5, seed=3)
        return layer_norm(y, weight, None) + total

    inputs, grads = problem((3, 5, 18), torch.float32, device)
    inputs.insert(1, torch.randn_like(inputs[0]))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(run(compiled, inputs, grads), run(block, inputs, grads), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(device):
    (x, weight, bias), _ = problem((3, 9), torch.float16, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert layer_norm(x, weight.float(), bias.float()).dtype == torch.float16


def test_second_backward_raises(device):
    (x, weight, bias), _ = problem((3, 9), torch.float32, device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8)}, r"weight must be \[9\]"),
        ({"bias": torch.ones(1, 9)}, r"bias must be \[9\]"),
        ({"x": torch.ones(3, 9, dtype=torch.int64)}, "x must be float16"),
        ({"x": torch.tensor(1.0)}, "at least one dimension"),
        ({"residual": torch.ones(9)}, r"residual must have x's shape \[3, 9\]"),
        ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
        ({"weight": torch.ones(9, device="meta")}, "weight on meta"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {
        "x": torch.ones(3, 9),
        "residual": torch.ones(3, 9),
        "weight": torch.ones(9),
        "bias": torch.ones(9),
    } | change
    arguments = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**arguments)


def far_rows(ours, device):
    """Three rows 2**30 elements apart, of which an int32 offset reaches two: the third would wrap to before the first.

    The storage covers that place too, so that a mutant reads wrong values instead of crashing. Untouched memory costs nothing.
    """
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    x = storage.as_strided((3, 64), (2**30, 1), 2**31)
    x.copy_(torch.randn(3, 64))
    storage[:64] = 1.0
    near = x.clone()
    weight = torch.randn(64, device=device).half()
    far, expected = (run(op, [t, weight, None], [t]) for op, t in ((ours.layer_norm, x), (layer_norm, near)))
    for a, b in zip(far, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_offsets_beyond_int32(device):
    far_rows(module, device)


def small_problem(ours, device):
    inputs, grads = problem((11, 300), torch.float32, device)
    inputs[0] += 2.0
    compare(ours.layer_norm, reference.layer_norm, inputs, grads)
    x, weight, bias = inputs
    compare_added(ours.add_layer_norm, [x, torch.randn_like(x), weight, bias], [grads[0], torch.randn_like(x)])
    dropout_problem(ours.add_layer_norm, (11, 300), torch.float32, device)


MUTANTS = {
    "masked lanes enter the variance": (
        "tl.where(c + cols < N, totals[c // CHUNK] - mean, 0.0)",
        "totals[c // CHUNK] - mean",
    ),
    "variance over N - 1": ("keep_dims=True) / N - rest", "keep_dims=True) / (N - 1) - rest"),
    "no mean of g": ("gs[c // CHUNK] - mean_g - ", "gs[c // CHUNK] - "),
    "no mean of g xhat": ("- xhats[c // CHUNK] * mean_gx", ""),
    "g summed in half precision": ("partial_g += g\n", "partial_g += g.to(tl.float16).to(acc_dtype)\n"),
    "dtotal dropped": ("                d += tl.load(dtotal_ptr", "                d += 0.0 * tl.load(dtotal_ptr"),
    "another mask in the backward": ("d = dropout(d, seed,", "d = dropout(d, seed + 1,"),
    "the next chunk's mask": (
        "d = dropout(d, seed, rows * ROW_COUNTERS + (c + cols)",
        "d = dropout(d, seed, rows * ROW_COUNTERS + (c + CHUNK + cols)",
    ),
    "last rows lost": ("tl.range(tl.program_id(0), tl.cdiv(M, ROWS)", "tl.range(tl.program_id(0), M // ROWS"),
    "first chunk's weight": (
        "y *= tl.load(weight_ptr + (c + cols), mask=c + cols < N",
        "y *= tl.load(weight_ptr + cols, mask=cols < N",
    ),
    "stride of the residual": ("residual_ptr + rows * stride_rm", "residual_ptr + rows * (stride_rm - 1)"),
    "partial sums of the first programs only": ("programs, N, dtype=mean.dtype", "programs + 1, N, dtype=mean.dtype"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("layer_norm", *MUTANTS[name]), device)


def test_int32_offsets_are_caught(device):
    broken = mutant("layer_norm", "rows = tl.program_id(0).to(tl.int64) * ROWS", "rows = tl.program_id(0) * ROWS")
    with pytest.raises(AssertionError):
        far_rows(broken, device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 1280, 1600, 12288])
def test_bfloat16_at_gpt2_shapes(width, device):
    inputs, grads = problem((2048, width), torch.bfloat16, device)
    compare(layer_norm, reference.layer_norm, inputs, grads)
    x, weight, bias = inputs
    compare_added(add_layer_norm, [x, torch.randn_like(x), weight, bias], [grads[0], torch.randn_like(x)])
    dropout_problem(add_layer_norm, (2048, width), torch.bfloat16, device)


@pytest.mark.gpu
def test_repeats_are_bit_equal(device):
    (x, weight, bias), (dy,) = problem((4099, 768), torch.bfloat16, device)
    inputs, grads = [x, torch.randn_like(x), weight, bias], [dy, torch.randn_like(x)]
    first = run(add_layer_norm, inputs, grads, dropout_p=0.1, seed=1)
    for _ in range(250):
        for a, b in zip(run(add_layer_norm, inputs, grads, dropout_p=0.1, seed=1), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph(device):
    x, residual = torch.randn(2, 64, 768, device=device)
    weight = torch.ones(768, device=device)
    add_layer_norm(x, residual, weight, None, dropout_p=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, total = add_layer_norm(x, residual, weight, None, dropout_p=0.5)
    graph.replay()
    first = total.clone()
    graph.replay()
    assert not torch.equal(first, total), "a replay draws a new mask"
    torch.testing.assert_close(y, reference.layer_norm(total, weight, None))

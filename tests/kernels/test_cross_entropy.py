"""cross_entropy against float64, and what both losses keep to, with torch in the same dtype as the yardstick."""

from __future__ import annotations

import math

import pytest
import torch
from cross_entropy_problems import (
    DTYPES,
    LAYOUTS,
    REDUCTIONS,
    assert_cross_entropy,
    assert_linear_cross_entropy,
    kernels,
    some_targets,
)
from mutants import mutants

from fastgpt_kernels import _launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("N", "V"),
    [(1, 1), (3, 2), (7, 7), (3, 63), (3, 257), (2, 8193)],  # the last takes several steps a row
)
def test_any_size(N, V, reduction, dtype, device):
    logits = torch.randn(N, V, device=device).mul(3).to(dtype)
    assert_cross_entropy(logits, some_targets(N, V, device, ignored=N // 3), reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_vocabulary(dtype, device):
    logits = torch.randn(2, 50257, device=device).mul(2).to(dtype)
    assert_cross_entropy(logits, torch.tensor([0, 50256], device=device), "mean")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype, device):
    targets = torch.stack([some_targets(3, 67, device)] * 2, 1)[:, 0]
    logits = LAYOUTS[layout](torch.randn(3, 67, device=device).to(dtype))
    for reduction in ("mean", "none"):
        assert_cross_entropy(logits, targets, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_incoming_gradient(reduction, dtype, device):
    logits, targets = torch.randn(6, 33, device=device).to(dtype), some_targets(6, 33, device, ignored=1)
    shape = (6,) if reduction == "none" else ()
    gradient = torch.randn(shape, device=device, dtype=torch.float64)
    assert_cross_entropy(logits, targets, reduction, gradient)
    assert_cross_entropy(logits, targets, reduction, torch.tensor(-0.25, device=device).expand(shape))
    if reduction == "none":
        assert_cross_entropy(logits, targets, reduction, torch.randn(6, 2, device=device, dtype=torch.float64)[:, 1])


def test_a_loss_scale_saves_fp16_gradients_from_underflow(device):
    logits, targets = torch.randn(4, 8192, device=device).half(), some_targets(4, 8192, device)
    scale = torch.tensor(2.0**14, device=device)
    assert_cross_entropy(logits, targets, "mean", scale)
    x, weight = torch.randn(4, 16, device=device).half(), torch.randn(600, 16, device=device).half()
    assert_linear_cross_entropy(x, weight, None, some_targets(4, 600, device), "mean", scale)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [5, 70])
def test_special_values(V, dtype, device):
    logits = torch.randn(8, V, device=device).to(dtype)
    logits[0, 1] = math.nan
    logits[1, 2] = math.inf
    logits[2] = -math.inf
    logits[3, 3] = -math.inf
    logits[4, ::2] = -math.inf
    logits[5] *= 1e4
    logits[6] = 6e4 if dtype == torch.float16 else 1e30
    logits[7] = -logits[6]
    targets = torch.tensor([0, 2, 3, 3, 1, int(logits[5].argmax()), 1, 1], device=device)
    assert_cross_entropy(logits, targets, "none")
    assert_cross_entropy(logits[3:], targets[3:].roll(1), "none")


def test_ignored_targets(device):
    logits, targets = torch.randn(6, 40, device=device), some_targets(6, 40, device, ignored=2)
    for reduction in REDUCTIONS:
        assert_cross_entropy(logits, targets, reduction)
        assert_cross_entropy(logits, torch.full_like(targets, -100), reduction)
        assert_cross_entropy(logits, targets.clamp(min=7), reduction, ignore_index=7)
    logits[:2] = math.nan  # never read, unlike torch, which lets them into the gradient
    logits.requires_grad_()
    kernels.cross_entropy(logits, targets).backward()
    assert logits.grad[:2].eq(0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 40, 2**31, 2**40, -(2**40)])
def test_targets_outside_the_vocabulary_give_nan(wrong, device):
    logits, targets = torch.randn(3, 40, device=device, requires_grad=True), some_targets(3, 40, device)
    targets[1] = wrong
    losses = kernels.cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().any(1).tolist() == [False, True, False]
    assert logits.grad[1].isnan().all()
    assert kernels.cross_entropy(logits, targets).isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction, device):
    targets = torch.empty(0, dtype=torch.int64, device=device)
    assert_cross_entropy(torch.empty(0, 9, device=device), targets, reduction)
    x, weight, bias = torch.empty(0, 4, device=device), torch.randn(9, 4, device=device), torch.randn(9, device=device)
    assert_linear_cross_entropy(x, weight, bias, targets, reduction)


def test_without_gradient_none_is_computed(device):
    logits, targets = torch.randn(4, 30, device=device, requires_grad=True), some_targets(4, 30, device)
    x, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(30, 8, device=device)
    for call in (
        lambda: kernels.cross_entropy(logits, targets),
        lambda: kernels.linear_cross_entropy(x, weight, targets),
    ):
        with _launch.record(90) as launches:
            with torch.no_grad():
                call()
            call()
        assert [launch.kwargs["WITH_GRAD"] for launch in launches] == [False, True]


def test_a_second_backward_raises(device):
    targets = some_targets(4, 30, device)
    logits = torch.randn(4, 30, device=device, requires_grad=True)
    loss = kernels.cross_entropy(logits, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    x, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(30, 8, device=device)
    for loss in (kernels.cross_entropy(logits, targets), kernels.linear_cross_entropy(x, weight, targets)):
        leaf = logits if loss.grad_fn.name().startswith("_Cross") else x
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
            gradient.sum().backward()
    # what is scaled out of place may be walked again, and doesn't compound
    loss = kernels.linear_cross_entropy(x, weight, targets)
    first, second = (
        torch.autograd.grad(loss, x, torch.tensor(3.0, device=device), retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_gradcheck(device):
    targets = some_targets(2, 5, device)
    double = {"device": device, "dtype": torch.float64, "requires_grad": True}
    logits = torch.randn(2, 5, **double)
    x, weight, bias = torch.randn(2, 2, **double), torch.randn(5, 2, **double), torch.randn(5, **double)
    for reduction in REDUCTIONS:
        options = {"reduction": reduction}
        assert torch.autograd.gradcheck(lambda a: kernels.cross_entropy(a, targets, **options), logits)  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda a, b, c: kernels.linear_cross_entropy(a, b, targets, c, **options),  # noqa: B023
            (x, weight, bias),
        )


def test_opcheck(device):
    logits, targets = torch.randn(5, 19, device=device), some_targets(5, 19, device, ignored=1)
    x, weight, bias = (
        torch.randn(5, 8, device=device),
        torch.randn(19, 8, device=device),
        torch.randn(19, device=device),
    )
    scale, half = torch.rand(5, device=device), torch.tensor(0.5, device=device)
    strided = logits.t().contiguous().t()
    for args in ((logits, targets, None, -100, 0.1, 0.2, True), (strided, targets, scale, -100, 0.0, 0.0, False)):
        torch.library.opcheck(kernels._cross_entropy.op, args)
    torch.library.opcheck(kernels._scale_.op, (logits.clone(), half))
    torch.library.opcheck(kernels._scaled.op, (logits, half, torch.float16))
    plain = None, targets, None, -100, 0.0, 0.0, [True, True, False], False
    given = bias, targets, scale, -100, 0.1, 0.2, [True, True, True], True
    for args in (plain, given):
        torch.library.opcheck(kernels._linear_cross_entropy.op, (x, weight, *args))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole(reduction, device):
    def step(x, weight, targets):
        logits = x @ weight.t()
        loss = kernels.cross_entropy(logits, targets, reduction=reduction)
        return (loss + kernels.linear_cross_entropy(x, weight, targets, reduction=reduction)).sum()

    targets = some_targets(5, 19, device, ignored=1)
    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 40, device=device).view(5, 8).requires_grad_()
        weight = torch.linspace(-1, 2, 152, device=device).view(19, 8).requires_grad_()
        (2 * run(x, weight, targets)).backward()
        gradients.append((x.grad, weight.grad))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_autocast(device):
    low = torch.float16 if device.type == "cpu" else torch.bfloat16  # no bf16 in the interpreter
    x, weight = (
        torch.randn(6, 16, device=device, requires_grad=True),
        torch.randn(40, 16, device=device, requires_grad=True),
    )
    targets = some_targets(6, 40, device)
    for reduction in REDUCTIONS:
        with torch.autocast(device.type, low):
            loss = kernels.linear_cross_entropy(x.to(low), weight, targets, reduction=reduction)
            assert kernels.cross_entropy(x, targets % 16).dtype == torch.float32
        loss.sum().backward()
        low_x, low_weight = x.detach().to(low).requires_grad_(), weight.detach().to(low).requires_grad_()
        expected = kernels.linear_cross_entropy(low_x, low_weight, targets, reduction=reduction)
        expected.sum().backward()
        assert torch.equal(loss, expected)
        assert torch.equal(x.grad, low_x.grad.float())
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad.to(low), low_weight.grad)  # the fp32 sum, rounded only here
        x.grad = weight.grad = None


def test_row_offsets_beyond_2_to_the_31(device):
    """Two rows 2^31 elements apart, of which only the touched pages exist."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((2, 40), (2**31, 1))
    near = torch.randn(2, 40, device=device).half()
    far.copy_(near)
    targets = some_targets(2, 40, device)
    losses = kernels.cross_entropy(far, targets, reduction="none")
    assert torch.equal(losses, kernels.cross_entropy(near, targets, reduction="none"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: kernels.cross_entropy(x[0], t), "logits must have two dimensions"),
        (lambda x, t: kernels.cross_entropy(x.long(), t), "logits must be float16"),
        (lambda x, t: kernels.cross_entropy(x, t[:2]), r"targets must be int64 \[3\]"),
        (lambda x, t: kernels.cross_entropy(x, t.int()), "got torch.int32"),
        (lambda x, t: kernels.cross_entropy(x, t, reduction="avg"), "reduction must be one of"),
        (lambda x, t: kernels.cross_entropy(x[:, :0], t), "logits has no columns"),
        (lambda x, t: kernels.cross_entropy(x, t.to("meta")), "must be on one device"),
        (lambda x, t: kernels.linear_cross_entropy(x, x[:, :3], t), r"weight must be \[V, 5\]"),
        (lambda x, t: kernels.linear_cross_entropy(x, x, t, x[0]), r"bias must be \[3\]"),
        (lambda x, t: kernels.linear_cross_entropy(x, x.half(), t), "must share a dtype"),
    ],
)
def test_bad_input(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 5, device=device), torch.zeros(3, dtype=torch.int64, device=device))


MUTANTS = {
    "no maximum taken off": ("loss = tl.log(l_row) - (x_target - m_row)", "loss = tl.log(l_row) - x_target"),
    "old sum not rescaled": ("l * _exp(m - m_safe) + ", "l + "),
    "sum kept in fp16": (
        "l * _exp(m - m_safe) + tl.sum(_exp(x - m_safe[:, None]), axis=1)",
        "(l * _exp(m - m_safe) + tl.sum(_exp(x - m_safe[:, None]), axis=1)).to(tl.float16).to(tl.float32)",
    ),
    "last column missed": ("head + n_body + lane - VEC)", "head + n_body + lane - VEC + 1)"),
    "vectors missed": ("mask = (start + cols < n_body) & used", "mask = (start + cols < n_body - VEC) & used"),
    "ignored rows not zero": ("tl.where(used, loss, 0.0)", "loss"),
    "gradient's vectors missed": ("in_row = start + cols < n_body", "in_row = start + cols < n_body - VEC"),
    "target's one forgotten": ("- smooth - scale * (1.0 - SMOOTHING)", "- smooth"),
    "incoming gradient forgotten": ("tl.where(used, scale / l_row, 0.0)", "tl.where(used, 1.0 / l_row, 0.0)"),
    "one scale for all rows": ("row_scale.stride(0) if", "0 if"),
    "count includes ignored": ("(targets != ignore_index).sum()", "(targets == targets).sum()"),
    "scale applied to some": ("if tl.program_id(0) == 0:", "if tl.program_id(0) == 1:"),
    "chunks overwrite dweight": ("beta=min(start, 1)", "beta=0"),
    "chunks share targets": ("chunk, targets[start:stop], scale", "chunk, targets[: stop - start], scale"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device, monkeypatch):
    _, ops = mutants(("_cross_entropy_rows", "cross_entropy"), *MUTANTS[name])
    monkeypatch.setattr(ops, "_chunk_bytes", lambda device: 1)
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", 2)
    targets = some_targets(3, 603, device, ignored=1)
    logits = torch.randn(3, 603, device=device) + 3

    def every_comparison():
        for reduction, grad in (("mean", torch.tensor(0.5)), ("none", torch.arange(1.0, 4.0))):
            assert_cross_entropy(logits.half(), targets, reduction, grad.to(device), ops=ops)
            assert_cross_entropy(logits, targets, reduction, grad.to(device), ops=ops)
        x, weight = torch.randn(3, 4, device=device), torch.randn(9, 4, device=device)
        assert_linear_cross_entropy(x, weight, None, some_targets(3, 9, device), ops=ops)

    with pytest.raises(AssertionError):
        every_comparison()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gpt2_sizes(reduction, dtype, device):
    targets = some_targets(512, 50257, device, ignored=60)
    logits = torch.randn(512, 50257, device=device).to(dtype)
    assert_cross_entropy(logits, targets, reduction)
    x, weight = (
        torch.randn(512, 768, device=device).to(dtype),
        torch.randn(50257, 768, device=device).mul(0.02).to(dtype),
    )
    assert_linear_cross_entropy(x, weight, None, targets, reduction)


@pytest.mark.gpu
def test_repeats_bit_for_bit(device):
    targets = some_targets(256, 50257, device)
    x, weight = (torch.randn(n, 768, device=device, dtype=torch.bfloat16) for n in (256, 50257))
    logits = x @ weight.t()

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (logits, x, weight)]
        losses = kernels.cross_entropy(leaves[0], targets), kernels.linear_cross_entropy(*leaves[1:], targets)
        torch.autograd.backward(losses)
        return [*losses, *(leaf.grad for leaf in leaves)]

    first = gradients()
    for _ in range(250):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(device):
    """The count of targets stays on the device: a replay with other targets divides by their number."""
    x = torch.randn(300, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50257, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = some_targets(300, 50257, device)

    def step():
        loss = kernels.linear_cross_entropy(x, weight, targets) + kernels.cross_entropy(x @ weight.t(), targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    targets.copy_(some_targets(300, 50257, device, ignored=100))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)

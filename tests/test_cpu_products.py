"""Products on a CPU: their numbers and gradients beside float64, when they are taken, and what runs without them."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_torch
from models import tiny_model
from torch import Tensor, nn

from fastgpt import cpu_products, ops, reference, use_backend


@pytest.fixture(autouse=True)
def forget():
    """What the process has found out about its products, before and after."""
    cpu_products.unavailable.cache_clear()
    yield
    cpu_products.unavailable.cache_clear()


@pytest.fixture
def elsewhere(monkeypatch):
    """A processor that isn't Intel's, whatever this one is."""
    monkeypatch.setattr(cpu_products, "vendor", lambda: "AuthenticAMD")
    why = cpu_products.unavailable(torch.float32)
    if why is not None:
        pytest.skip(why)


@pytest.fixture
def calls(elsewhere, monkeypatch):
    """Shapes of the products that oneDNN made."""
    made, onednn = [], cpu_products._onednn
    monkeypatch.setattr(cpu_products, "_onednn", lambda x, w, b: made.append((len(x), *w.shape)) or onednn(x, w, b))
    return made


def layout(how: str, rows: int, columns: int) -> Tensor:
    whole = torch.randn(rows + 3, columns + 5)
    return {
        "contiguous": whole[:rows, :columns].clone(),
        "rows of more": whole[2 : 2 + rows].clone()[:, :columns],
        "transposed": torch.randn(columns, rows).T,
        "slice of rows": torch.randn(rows + 3, columns)[2 : 2 + rows],
        "one row": torch.randn(1, columns).expand(rows, columns),
    }[how]


LAYOUTS = ("contiguous", "rows of more", "transposed", "slice of rows", "one row")


@pytest.mark.parametrize("rows", [1, 2, 65])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_results_and_gradients_are_as_accurate_as_torchs(rows, of_weight, of_x, elsewhere):
    x, weight, bias, grad = layout(of_x, rows, 70), layout(of_weight, 50, 70), torch.randn(50), torch.randn(rows, 50)

    def run(linear, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = linear(*inputs)
        return y, *torch.autograd.grad(y, inputs, grad.to(dtype))

    ours, peer, exact = (
        run(*how) for how in ((ops.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64))
    )
    for name, *values in zip(("y", "x", "weight", "bias"), ours, peer, exact, strict=True):
        assert_as_accurate_as_torch(*values, name)
    assert_as_accurate_as_torch(ops.linear(x, weight), F.linear(x, weight), F.linear(x.double(), weight.double()))


def test_gradients_have_gradients(elsewhere):
    x, weight, target = torch.randn(6, 20), torch.randn(30, 20), torch.randn(6, 30)

    def second(linear, dtype):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = (linear(a, w) - target.to(dtype)).tanh().square().sum()
        of_a, of_w = torch.autograd.grad(loss, (a, w), create_graph=True)
        return torch.autograd.grad(of_a.square().sum() + of_w.sin().sum(), (a, w))

    ways = (ops.linear, torch.float32), (F.linear, torch.float32), (F.linear, torch.float64)
    for values in zip(*(second(*way) for way in ways), strict=True):
        assert_as_accurate_as_torch(*values)


def test_only_wanted_gradients_are_computed(calls):
    weight, x = nn.Parameter(torch.randn(30, 20)), torch.randn(6, 20)
    ops.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert calls == [(6, 30, 20)]
    weight.requires_grad_(False)
    (gradient,) = torch.autograd.grad(ops.linear(x.requires_grad_(), weight).sum(), x)
    assert calls[1:] == [(6, 30, 20), (6, 20, 30)]
    torch.testing.assert_close(gradient, weight.sum(0).expand(6, 20))


def test_losses_are_the_references(calls):
    x, weight, bias = torch.randn(9, 20), torch.randn(30, 20), torch.randn(30)
    targets = torch.tensor([3, -1, 5, 29, 0, 7, -1, 8, 9])
    how = {"ignore_index": -1, "reduction": "sum", "label_smoothing": 0.1, "z_loss": 0.01}
    ways = [(ops.linear_cross_entropy, how), (ops.linear_cross_entropy_with_statistics, how)]
    ways += [(op, {}) for op in (ops.linear_cross_entropy, ops.linear_cross_entropy_with_statistics)]
    for op, settings in ways:
        rows = slice(None) if settings else targets >= 0
        calls.clear()
        found = op(x[rows], weight, targets[rows], bias, **settings)
        assert len(calls) == 1
        with use_backend("reference"):
            expected = op(x[rows].double(), weight.double(), targets[rows], bias.double(), **settings)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("shape", [(20,), (2, 3, 20), (0, 20), (2, 0, 20)], ids=str)
def test_rows_of_any_shape(shape, elsewhere):
    x, weight, bias = torch.randn(shape), torch.randn(30, 20), torch.randn(30)
    y = ops.linear(x, weight, bias, "gelu")
    assert_as_accurate_as_torch(
        y, F.gelu(F.linear(x, weight, bias)), F.gelu(F.linear(*(t.double() for t in (x, weight, bias))))
    )


def test_nan_and_inf_come_through(elsewhere):
    x, weight = torch.randn(3, 20), torch.randn(30, 20).abs()
    x[0, 4], x[1, 5] = torch.nan, torch.inf
    y = ops.linear(x, weight)
    assert y[0].isnan().all()
    assert (y[1] == torch.inf).all()
    assert y[2].isfinite().all()


def test_errors_are_torchs(elsewhere):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(torch.randn(3, 20), torch.randn(30, 21))
    with pytest.raises(ValueError, match=r"activation must be None or one of .* got 'swish'"):
        ops.linear(torch.randn(3, 20), torch.randn(30, 20), activation="swish")


def test_a_models_products_are_taken_but_not_a_hooked_ones(calls):
    model, idx = tiny_model(n_layers=1), torch.randint(101, (2, 7))
    fast = model(idx)
    assert sorted(calls) == sorted([(14, 32, 32)] * 4 + [(14, 128, 32), (14, 32, 128), (14, 101, 32)])
    with use_backend("reference"):
        exact = model(idx)
    assert len(calls) == 7
    torch.testing.assert_close(fast, exact)
    seen = []
    model.trf_blocks[0].att.W_key.register_forward_hook(lambda *args: seen.append(1))
    model.out_head.register_forward_hook(lambda *args: seen.append(1))
    calls.clear()
    model(idx)
    assert len(seen) == 2
    assert len(calls) == 5


def test_a_models_loss_and_gradients_are_as_accurate_as_the_references(elsewhere):
    model, idx = tiny_model(tie_weights=True), torch.randint(101, (2, 9))

    def gradients(model):
        model.zero_grad()
        loss = model.loss(idx[:, :-1], idx[:, 1:])
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    ours = gradients(model)
    with use_backend("reference"):
        peer, exact = gradients(model), gradients(model.double())
    for name in ours:
        assert_as_accurate_as_torch(ours[name], peer[name], exact[name].double(), name)


def test_changes_of_a_parameter_are_seen(elsewhere):
    linear, x = nn.Linear(20, 30), torch.randn(1, 20)
    with torch.no_grad():
        ops.linear(x, linear.weight, linear.bias)
        linear.weight.mul_(2.0)
        linear.weight.data[3] = 0.5
        torch.testing.assert_close(ops.linear(x, linear.weight, linear.bias), linear(x))


@pytest.mark.filterwarnings(  # torch's own, in forward mode and behind its switch
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",
    "ignore:TF32 acceleration on top of oneDNN:UserWarning",
)
@pytest.mark.parametrize("how", ["autocast", "vmap", "forward mode", "meta", "float64", "switched off"])
def test_elsewhere_the_reference_computes(how, calls):
    x, weight = torch.randn(4, 20), torch.randn(30, 20)
    expected = F.linear(x, weight)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.linear(x, weight).dtype == torch.bfloat16
    elif how == "vmap":
        torch.testing.assert_close(torch.vmap(lambda row: ops.linear(row, weight))(x), expected)
    elif how == "forward mode":
        _, tangent = torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (x,))
        torch.testing.assert_close(tangent, expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(ops.linear(dual, weight)).tangent
        torch.testing.assert_close(tangent, expected)
    elif how == "meta":
        assert ops.linear(x.to("meta"), weight.to("meta")).shape == (4, 30)
    elif how == "float64":
        assert torch.equal(ops.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    else:
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(ops.linear(x, weight), expected)
    assert not calls


def test_a_compiled_model_has_no_product_that_a_compiler_cannot_see(calls):
    compiled = torch.compile(lambda x, w: ops.linear(x, w), fullgraph=True, backend="eager")
    x, weight = torch.randn(4, 20), torch.randn(30, 20)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert not calls


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_bf16_rows_where_the_matrix_times_a_vector_is_faster(rows, bias, monkeypatch):
    monkeypatch.setattr(cpu_products, "vendor", lambda: "GenuineIntel")
    x, weight, b = torch.randn(rows, 70), torch.randn(50, 70), torch.randn(50) if bias else None

    def made(linear, dtype):
        return linear(*(t if t is None else t.to(torch.bfloat16).to(dtype) for t in (x, weight, b)))

    exact, peer = made(F.linear, torch.float64), made(F.linear, torch.bfloat16)
    assert_as_accurate_as_torch(made(ops.linear, torch.bfloat16), peer, exact)
    with torch.no_grad():
        assert_as_accurate_as_torch(made(ops.product(x.bfloat16()), torch.bfloat16), peer, exact)
    leaf = weight.bfloat16().requires_grad_()
    ops.linear(x.bfloat16(), leaf).sum().backward()
    torch.testing.assert_close(leaf.grad.float(), x.bfloat16().float().sum(0).expand(50, 70), rtol=1e-2, atol=1e-2)


def test_what_multiplies_a_tokens_rows_is_chosen_once(calls):
    x, weight = torch.randn(1, 20), torch.randn(30, 20)
    with torch.no_grad():
        torch.testing.assert_close(ops.product(x)(x, weight, None), F.linear(x, weight))
        assert calls == [(1, 30, 20)]
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.product(x)(x, weight, None).dtype == torch.bfloat16
        with use_backend("reference"):
            assert torch.equal(ops.product(x)(x, weight, None), F.linear(x, weight))
    leaf = weight.clone().requires_grad_()
    ops.product(x)(x, leaf, None).sum().backward()
    assert leaf.grad is not None
    assert len(calls) == 1


@pytest.mark.parametrize("op", cpu_products.OPS)
def test_they_take_what_the_reference_takes(op):
    inspect.signature(getattr(cpu_products, op)).bind(*inspect.signature(getattr(reference, op)).parameters)


@pytest.mark.parametrize("fault", ["missing", "another signature", "wrong"])
def test_an_op_that_is_missing_or_wrong_is_never_used(fault, monkeypatch):
    def broken(x, weight, bias):
        if fault == "missing":
            raise RuntimeError("Could not run")
        if fault == "another signature":
            raise TypeError("expected 5 arguments")
        return F.linear(x, weight, bias) + (len(x) == 1)

    monkeypatch.setattr(cpu_products, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(cpu_products, "_onednn", broken)
    x, weight = torch.randn(1, 20), torch.randn(30, 20)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    choice, why = ops.explain("linear", x.device, x.dtype)
    assert choice == "reference"
    assert "oneDNN's product gives wrong numbers here" in why or "MKL" in why


def test_the_choice_is_by_vendor_and_dtype(elsewhere, monkeypatch):
    cpu = torch.device("cpu")
    assert ops.explain("mlp", cpu, torch.float32) == ("cpu_products", "faster on AuthenticAMD")
    assert ops.explain("mlp", cpu, torch.bfloat16)[0] == "reference"
    assert ops.explain("layer_norm", cpu, torch.float32)[0] == "reference"
    with use_backend("reference"):
        assert ops.explain("mlp", cpu, torch.float32) == ("reference", "asked for")
    cpu_products.unavailable.cache_clear()
    monkeypatch.setattr(cpu_products, "vendor", lambda: "GenuineIntel")
    assert ops.explain("mlp", cpu, torch.float32) == ("reference", "on Intel's processors MKL is the faster one")
    assert ops._module("mlp", torch.randn(2, 2)) is reference

"""Int8 and int4 weights: the integers, what they stand for, and what they cost in bits per byte."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_torch
from models import tiny_model
from torch import nn

from examples.train_bundled_model import standard_library
from fastgpt import GPTModel, cpu_products, generate, quantize, use_backend
from fastgpt.checkpoints.weights import CheckpointError, load_pretrained
from fastgpt.evaluation import evaluate
from fastgpt.files import BUNDLED
from fastgpt.layers import Int4Linear, Int8Linear, QuantizedLinear
from fastgpt.reference import WIDENED_ROWS
from fastgpt.text.tokenizer import load_tokenizer

LINEARS = 2 * 6 + 1


@pytest.fixture
def model():
    return tiny_model(tie_weights=True)


def stands_for(module: QuantizedLinear) -> torch.Tensor:
    """The weights in float64, written out here once more."""
    weight, scale = module.weight, module.scale.double()
    if module.bits == 8:
        return weight.double() * scale[:, None]
    rows = []
    for row, steps in zip(weight.tolist(), scale.tolist(), strict=True):
        q = [nibble for byte in row for nibble in (byte % 16, byte // 16)]
        rows.append([(q[k] - 8) * steps[k // 32][0] + steps[k // 32][1] for k in range(len(q))])
    return torch.tensor(rows, dtype=torch.float64)


def dequantized(model: GPTModel) -> GPTModel:
    """A plain float64 model of the weights that a quantized one stands for."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = stands_for(module)
            del state[f"{name}.scale"]
    plain = GPTModel(model.config.replace(tie_weights=False)).double().eval()
    plain.load_state_dict(state)
    return plain


def test_integers_are_the_nearest_and_use_the_whole_range(model):
    before, quantized = copy.deepcopy(model.state_dict()), quantize(model)
    found = {name: module for name, module in quantized.named_modules() if isinstance(module, Int8Linear)}
    assert len(found) == LINEARS
    for name, module in found.items():
        exact = before[name + ".weight"].double().numpy()
        scale = np.abs(exact).max(axis=1) / 127
        np.testing.assert_allclose(module.scale.numpy(), scale, rtol=1e-6)
        integers = module.weight.numpy().astype(np.float64)
        assert (np.abs(integers).max(axis=1) == 127).all()
        assert (np.abs(integers * module.scale.double().numpy()[:, None] - exact) <= 0.5001 * scale[:, None]).all()
        if module.bias is not None:
            assert torch.equal(module.bias, before[name + ".bias"])


def test_the_model_itself_and_all_else_stay(model):
    before, logits = copy.deepcopy(model.state_dict()), model(torch.tensor([[1, 2, 3]]))
    quantized = quantize(model)
    assert type(quantized) is GPTModel
    with torch.no_grad():
        for parameter in quantized.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.out_head.weight is model.tok_emb.weight
    for name, tensor in quantize(model).state_dict().items():
        if "emb" in name or "norm" in name:
            assert torch.equal(tensor, before[name]), name
    assert not quantized.training
    assert quantize(model.train()).training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_logits_loss_and_tokens_are_those_of_what_the_integers_stand_for(model, weights, dtype):
    quantized = quantize(model, weights).to(dtype)
    plain, idx = dequantized(quantized), torch.randint(101, (3, 12))
    assert quantized.out_head.scale.dtype == (torch.float32 if weights == "int8" else torch.bfloat16), "they would move"
    exact, peer = plain(idx), copy.deepcopy(plain).to(dtype)(idx)
    allowed = 2 * (peer.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (quantized(idx).double() - exact).abs().max() <= allowed
    if dtype != torch.bfloat16:
        assert quantized.loss(idx, idx).item() == pytest.approx(plain.loss(idx, idx).item(), rel=1e-5)
        prompts = [[5, 6, 7], [9], [4, 4, 5, 4, 4]]
        expected = generate(plain, prompts, 18)
        assert generate(quantized, prompts, 18) == expected
        assert generate(quantized, prompts, 18, lookup=3) == expected


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(40, 96), (WIDENED_ROWS + 3, 200), (cpu_products.TILE, cpu_products.DEEP)]
)
def test_int8_products_on_a_cpu(rows, dtype, bias, outputs, inputs):
    """As bags of one tile and of many, in parts, and where the sums before scaling are past float16's range."""
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    x = torch.randn(1, rows, inputs, dtype=dtype) + (300.0 if dtype == torch.float16 else 0.0)
    quantized = Int8Linear(linear).to(dtype)
    exact = F.linear(x.double(), stands_for(quantized))
    exact = exact + quantized.bias.double() if bias else exact
    peer = F.linear(x, quantized.dequantized(dtype), quantized.bias)
    assert_as_accurate_as_torch(quantized(x), peer, exact)
    with use_backend("reference"):
        assert_as_accurate_as_torch(quantized(x), peer, exact, "the reference")
    # with gradients it may take another way
    assert_as_accurate_as_torch(quantized(x.requires_grad_()), peer, exact, "with gradients")


@pytest.mark.parametrize("rows", [1, cpu_products.INT4_ROWS, cpu_products.INT4_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_int4_products_on_a_cpu(rows, dtype, bias):
    """Up to cpu_products.INT4_ROWS rows as accurate as torch in bf16, which they are rounded to; else as in x's dtype."""
    quantized, x = Int4Linear(nn.Linear(96, 37, bias=bias)).to(dtype), torch.randn(1, rows, 96, dtype=dtype)
    inputs = (x, quantized.dequantized(torch.float64), quantized.bias)
    assert torch.equal(inputs[1], stands_for(quantized))

    def product(dtype):
        return F.linear(*(t if t is None else t.to(dtype) for t in inputs))

    exact = product(torch.float64)
    rounded = torch.bfloat16 if rows <= cpu_products.INT4_ROWS and dtype != torch.float64 else dtype
    assert_as_accurate_as_torch(quantized(x).to(rounded), product(rounded), exact)
    assert quantized(x).dtype == dtype
    with use_backend("reference"):
        assert_as_accurate_as_torch(quantized(x), product(dtype), exact, "the reference")
    assert_as_accurate_as_torch(quantized(x.requires_grad_()), product(dtype), exact, "with gradients")


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_a_change_of_rounded_weights_is_seen(kind):
    """The copies of a CPU's products are made anew for weights that changed in place or were loaded, and go with the weights."""
    quantized, other, x = kind(nn.Linear(64, 48)), kind(nn.Linear(64, 48)), torch.randn(1, 64)
    assert not torch.equal(quantized(x), other(x))
    quantized.load_state_dict(other.state_dict())
    assert torch.equal(quantized(x), other(x))
    kept = len(cpu_products._copies)
    del quantized, other
    assert len(cpu_products._copies) < kept


@pytest.mark.parametrize("op", ["_bags", "_int4"])
@pytest.mark.parametrize("fault", [AttributeError, RuntimeError, None])
def test_without_torchs_ops_the_weights_are_widened(op, fault, monkeypatch):
    def broken(x, *args):
        if fault is not None:
            raise fault("no such op")
        return x.new_zeros(len(x), args[-1])

    monkeypatch.setattr(cpu_products, op, broken)
    for known in (cpu_products._bags_are_exact, cpu_products._int4_is_exact):
        known.cache_clear()
    quantized, x = (Int8Linear if op == "_bags" else Int4Linear)(nn.Linear(64, 48)), torch.randn(1, 64)
    try:
        torch.testing.assert_close(quantized(x), F.linear(x, quantized.dequantized(x.dtype), quantized.bias))
    finally:
        for known in (cpu_products._bags_are_exact, cpu_products._int4_is_exact):
            known.cache_clear()


def test_four_bits_are_the_nearest_of_sixteen_steps():
    linear = nn.Linear(64, 40)
    with torch.no_grad():
        linear.weight[3, :32] = 0.25  # a group of one value
        linear.weight[4] = 0.0
    quantized, exact = Int4Linear(linear), linear.weight.detach().double()
    assert quantized.weight.dtype == torch.uint8
    assert quantized.weight.shape == (40, 32)
    groups = exact.unflatten(1, (2, 32))
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    # Half a step, and what rounding step and middle to 8 bits moves at the ends.
    error = (stands_for(quantized).unflatten(1, (2, 32)) - groups).abs()
    assert (error <= span / 30 + groups.abs().amax(-1, keepdim=True) * 2**-7).all()
    assert error.square().mean().sqrt() <= 1.1 * (span.square().mean() / 15**2 / 12).sqrt()
    assert torch.equal(quantized.dequantized(torch.float32)[3, :32], torch.full((32,), 0.25))
    assert torch.equal(quantized.dequantized(torch.float32)[4], torch.zeros(64))
    size = sum(t.numel() * t.itemsize for t in (quantized.weight, quantized.scale))
    assert 8 * size == 5 * exact.numel()


def test_products_on_a_cpu_under_autocast_do_not_overflow():
    quantized, x = Int8Linear(nn.Linear(768, 64)), torch.full((2, 768), 100.0)
    exact = F.linear(x.double(), quantized.weight.double() * quantized.scale.double()[:, None], quantized.bias.double())
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(quantized(x).double(), exact, rtol=1e-5, atol=1e-3)


def test_gradients_reach_the_input():
    linear = nn.Linear(24, 40).double()
    quantized, x = Int8Linear(linear), torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    weight = quantized.weight.double() * quantized.scale.double()[:, None]
    torch.testing.assert_close(quantized(x), x @ weight.T + linear.bias, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(quantized(x).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * (x @ weight.T + linear.bias) @ weight, rtol=1e-12, atol=1e-12)


def test_rows_of_zeros_and_of_one_outlier():
    linear = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1e30, -1e30, 1, 0], [1e-30, 0, 0, -5e-31]]))
    quantized = Int8Linear(linear)
    assert quantized.weight.tolist() == [[0, 0, 0, 0], [127, -127, 0, 0], [127, 0, 0, -64]]
    assert torch.equal(quantized.dequantized(torch.float32)[0], torch.zeros(4))


def test_copies_and_state_dicts_carry_the_integers(model):
    quantized, idx = quantize(model), torch.tensor([[1, 2, 3]])
    other = quantize(tiny_model(seed=5, tie_weights=True))
    assert not torch.equal(other(idx), quantized(idx))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(idx), quantized(idx))
    assert torch.equal(copy.deepcopy(quantized)(idx), quantized(idx))
    size = sum(t.numel() * t.itemsize for t in quantized.out_head.state_dict().values())
    assert size == 101 * 32 + 101 * 4


def test_what_cannot_be_quantized_is_named(model):
    with pytest.raises(ValueError, match=r"weights must be one of \('int8', 'int4'\), got 'int2'"):
        quantize(model, "int2")
    with pytest.raises(ValueError, match=r"W_query: a row of weights must be a multiple of 32 to become int4, got 48"):
        quantize(tiny_model(emb_dim=48), "int4")
    with pytest.raises(ValueError, match="int4 weights are read on a CPU alone, got a tensor on meta; use int8 there"):
        Int4Linear(nn.Linear(32, 8))(torch.randn(1, 32, device="meta"))
    with pytest.raises(TypeError, match=r"no nn.Linear; it is quantized already"):
        quantize(quantize(model))
    hook = model.trf_blocks[1].att.W_key.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match=r"trf_blocks.1.att.W_key must be a plain nn.Linear .* got Linear or its hooks"):
        quantize(model)
    hook.remove()
    with torch.no_grad():
        model.trf_blocks[0].ff.layers[0].weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"trf_blocks.0.ff.layers.0: weights must be finite to become int8, got nan"):
        quantize(model)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shard", [None, 4000])
def test_a_quantized_model_comes_back_as_it_was(weights, shard, tmp_path):
    quantized, idx = quantize(tiny_model(tie_weights=True, vocab_multiple=8), weights), torch.randint(101, (2, 9))
    GPTModel(quantized.config).save_pretrained(tmp_path)  # which it replaces
    quantized.save_pretrained(tmp_path, max_shard_bytes=shard)
    loaded = GPTModel.from_pretrained(tmp_path)
    assert loaded.config == quantized.config
    assert not loaded.training
    before, after = quantized.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(loaded(idx), quantized(idx))
    assert loaded.generate(idx, 5).tolist() == quantized.generate(idx, 5).tolist()
    tiny_model(tie_weights=True).save_pretrained(tmp_path)
    assert not any(isinstance(module, QuantizedLinear) for module in GPTModel.from_pretrained(tmp_path).modules())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_what_is_rounded_keeps_its_bits_whatever_dtype_is_saved_or_loaded(model, weights, tmp_path):
    quantized = quantize(model, weights)
    quantized.save_pretrained(tmp_path, dtype=torch.bfloat16)
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        loaded = GPTModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {expected}
        for (name, mine), (_, theirs) in zip(loaded.named_buffers(), quantized.named_buffers(), strict=True):
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), name


def test_a_quantized_checkpoint_is_taken_for_no_other(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    quantize(model, "int4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fastgpt"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"int4 weights, which GPTModel.from_pretrained alone loads"):
        load_pretrained(tmp_path)


def test_a_quantized_checkpoint_that_is_not_whole_is_refused(model, tmp_path):
    quantized = quantize(model)
    quantized.save_pretrained(tmp_path)
    said = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(said.replace('"int8"', '"int4"'))
    with pytest.raises(CheckpointError, match=r"W_query.weight is torch.int8 \[32, 32\], not torch.uint8 \[32, 16\]"):
        GPTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(said.replace('"int8"', '"int2"'))
    with pytest.raises(CheckpointError, match=r"weights='int2', which is none of \('int8', 'int4'\)"):
        GPTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(said.replace('"n_heads": 4', '"n_heads": 2'))
    with pytest.raises(CheckpointError, match="different saves"):
        GPTModel.from_pretrained(tmp_path)
    quantized.out_head = nn.Linear(32, 101)
    with pytest.raises(ValueError, match=r"must be of one kind to be saved, got \['Int8Linear', 'Linear'\]"):
        quantized.save_pretrained(tmp_path)


def test_what_rounding_costs_the_bundled_model():
    """On one file held out from its training, email/generator.py. It is stored in int8, so that int8 costs nothing more."""
    _, held_out = standard_library()
    model, tokenizer = GPTModel.from_pretrained("bundled"), load_tokenizer(BUNDLED)
    documents = [held_out["email/generator.py"]]
    rounded = quantize(model), quantize(model, "int4")
    exact, int8, int4 = (evaluate(m, tokenizer, documents).bits_per_byte for m in (model, *rounded))
    print(f"{exact:.4f} bits per byte, {int8:.4f} with int8 weights, {int4:.4f} with int4 weights")
    assert int8 == pytest.approx(exact, rel=1e-5)
    assert exact < int4 < 1.02 * exact

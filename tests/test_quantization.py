"""Int8 weights: the integers, what they stand for, and what they cost in bits per byte."""

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
from fastgpt import GPTModel, generate, quantize
from fastgpt.checkpoints.weights import BUNDLED
from fastgpt.evaluation import evaluate
from fastgpt.layers import Int8Linear
from fastgpt.reference import WIDENED_ROWS
from fastgpt.text.tokenizer import load_tokenizer

LINEARS = 2 * 6 + 1


@pytest.fixture
def model():
    return tiny_model(tie_weights=True)


def dequantized(model: GPTModel) -> GPTModel:
    """A plain float64 model of the weights that a quantized one stands for."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for name in [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8]:
        state[name] *= state.pop(name.removesuffix("weight") + "scale")[:, None]
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
def test_logits_loss_and_tokens_are_those_of_what_the_integers_stand_for(model, dtype):
    quantized = quantize(model).to(dtype)
    plain, idx = dequantized(quantized), torch.randint(101, (3, 12))
    assert quantized.out_head.scale.dtype == torch.float32, "a scale of 8 bits would move every weight"
    exact, peer = plain(idx), copy.deepcopy(plain).to(dtype)(idx)
    allowed = 2 * (peer.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (quantized(idx).double() - exact).abs().max() <= allowed
    if dtype != torch.bfloat16:
        assert quantized.loss(idx, idx).item() == pytest.approx(plain.loss(idx, idx).item(), rel=1e-5)
        prompts = [[5, 6, 7], [9], [4, 4, 5, 4, 4]]
        expected = generate(plain, prompts, 18)
        assert generate(quantized, prompts, 18) == expected
        assert generate(quantized, prompts, 18, lookup=3) == expected


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_products_on_a_cpu(rows, dtype, bias):
    """In parts, by torch's own kernel, and where the sums before scaling are past float16's range."""
    linear = nn.Linear(96, WIDENED_ROWS + 3, bias=bias, dtype=torch.float64)
    x = torch.full((rows, 96), 300.0, dtype=dtype).view(1, rows, 96) + torch.randn(1, rows, 96, dtype=dtype)
    quantized = Int8Linear(linear).to(dtype)
    exact = F.linear(x.double(), quantized.weight.double() * quantized.scale.double()[:, None])
    exact = exact + quantized.bias.double() if bias else exact
    peer = F.linear(x, quantized.dequantized(dtype), quantized.bias)
    assert_as_accurate_as_torch(quantized(x), peer, exact)
    # with gradients it may take another way
    assert_as_accurate_as_torch(quantized(x.requires_grad_()), peer, exact, "with gradients")


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


def test_what_cannot_be_quantized_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"weights must be one of \('int8',\), got 'int4'"):
        quantize(model, "int4")
    with pytest.raises(TypeError, match=r"no nn.Linear; it is quantized already"):
        quantize(quantize(model))
    with pytest.raises(ValueError, match=r"26 places.*\n.*trf_blocks.0.att.W_query.scale has no place"):
        quantize(model).save_pretrained(tmp_path)
    hook = model.trf_blocks[1].att.W_key.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match=r"trf_blocks.1.att.W_key must be a plain nn.Linear .* got Linear or its hooks"):
        quantize(model)
    hook.remove()
    with torch.no_grad():
        model.trf_blocks[0].ff.layers[0].weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"trf_blocks.0.ff.layers.0: weights must be finite to become int8, got nan"):
        quantize(model)


def test_bundled_model_loses_under_one_bit_in_a_thousand():
    """On email/generator.py of the standard library, held out from its training; all held-out files cost 0.01% more bits."""
    _, held_out = standard_library()
    model, tokenizer = GPTModel.from_pretrained("bundled"), load_tokenizer(BUNDLED)
    documents = [held_out["email/generator.py"]]
    exact, quantized = (evaluate(m, tokenizer, documents).bits_per_byte for m in (model, quantize(model)))
    print(f"{exact:.4f} bits per byte, {quantized:.4f} with int8 weights")
    assert exact != quantized
    assert quantized < 1.001 * exact

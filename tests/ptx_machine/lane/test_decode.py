"""A token of the decode engine on the machine: every kernel of it, its cache, and its dependent launches."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from compare import assert_as_accurate_as_torch
from fused_token import prefilled, token_weights
from models import tiny_model
from ptx_machine.lane.precision import PRECISIONS
from ptx_machine.machine import machine

from fastgpt import GPTModel, generate, ops, use_backend

token = importlib.import_module("fastgpt_kernels.decode_token")

STEPS = 2
SHAPES = {
    "one row": ({"emb_dim": 128, "n_heads": 2}, [[5, 6, 7]]),
    "ragged rows, two splits": ({"emb_dim": 160, "n_heads": 2, "context_length": 160}, [[1, 2], [3] * 140, [7]]),
    "odd width, no biases": ({"emb_dim": 66, "n_heads": 3, "bias": False, "qkv_bias": False}, [[1, 2], [3] * 9]),
    "heads of 80, eight rows": ({"emb_dim": 160, "n_heads": 2, "n_layers": 1}, [[7] * n for n in range(1, 9)]),
}


def decode(ops, model, cache, tokens, pdl):
    """Logits of tokens [STEPS, B] fed one after another; what the cache doesn't hold yet is NaN."""
    for row, length in enumerate(cache.lengths):
        cache.keys[:, row, :, length:] = cache.values[:, row, :, length:] = torch.nan
    config, weights = model.config, token_weights(ops, model)
    buffers = ops.token_buffers(weights, len(cache.lengths), config.n_heads, cache.max_length, config.vocab_size)
    positions = cache.device_lengths.clone()
    rest = weights, cache.keys, cache.values, buffers, config.activation, config.norm_eps
    logits = torch.stack([ops.decode_token(step, positions, *rest, pdl=pdl).clone() for step in tokens])
    assert positions.tolist() == [length + len(tokens) for length in cache.lengths]
    return logits


def expected(model, prompts, tokens):
    cache = prefilled(model, prompts, model.config.context_length)
    with use_backend("reference"):
        return torch.stack([model(step[:, None], cache=cache)[:, 0] for step in tokens])


@torch.no_grad()
def check_token(arch, precision, name, pdl):
    changes, prompts = SHAPES[name]
    model = tiny_model(**{"tie_weights": True, "vocab_size": 300} | changes).to(PRECISIONS[precision].dtype)
    double = GPTModel(model.config).double().eval()
    double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    tokens = torch.randint(300, (STEPS, len(prompts)))
    cache = prefilled(model, prompts, model.config.context_length)
    with machine(arch, sms=132 if arch == 90 else 16):  # where `project` has 8 columns a program, and 4
        ours = decode(token, model, cache, tokens, pdl)
    plain, exact = expected(model, prompts, tokens), expected(double, prompts, tokens)
    assert_as_accurate_as_torch(ours.to(plain.dtype), plain, exact, "logits")


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(n, p, marks=pytest.mark.one_of(f"token {p}")) for n in SHAPES for p in ("bf16", "fp16", "fp32")],
)
def test_a_token_is_as_accurate_as_torch(arch, name, precision):
    check_token(arch, precision, name, pdl=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.one_of("token of dependent launches")) for n in SHAPES]
)
def test_a_token_of_dependent_launches(name):
    check_token(90, "bf16", name, pdl=True)


def test_generation_through_the_engine():
    """Whose launches are dependent ones there."""
    model = tiny_model(emb_dim=64, tie_weights=True, context_length=64)
    prompts = [[5, 6, 7], [9]]
    want = generate(model.double(), prompts, 4)  # float64: its argmax is the exact one
    with machine(90) as m, use_backend("triton"):
        assert ops.dependent_launches(model.device)
        assert generate(model.float(), prompts, 4) == want
    assert any("_token_" in t.kernel for t in m.timings)


# Mutants: without its wait, or with the wait behind any load, each kernel of a token reads what the one before hasn't finished.

KERNELS = [kernel for kernel in vars(token) if re.fullmatch(r"_token_\w+_kernel", kernel)]
WAIT = re.compile(r".*griddepcontrol\.wait.*\n")


def without_wait(text):
    return WAIT.sub("", text)


def wait_behind_all(text):
    """In front of the last instruction, where there is one way out; else in front of each `ret`."""
    return re.sub(r"(\n\s*ret;)", r"\n griddepcontrol.wait;\1", WAIT.sub("", text))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("edit", [without_wait, wait_behind_all])
def test_a_kernel_that_does_not_wait_is_found(kernel, edit):
    def change(text):
        return edit(text) if kernel in text else text

    changes, prompts = SHAPES["one row"]
    model = tiny_model(**{"tie_weights": True, "n_layers": 1} | changes).bfloat16()
    cache = prefilled(model, prompts, 16)
    with torch.no_grad(), machine(90, strict=False, change=change) as m:
        decode(token, model, cache, torch.randint(101, (STEPS, 1)), pdl=True)
    found = [f for f in m.report.errors if f.kind == "dependent launch"]
    assert {f.kernel for f in found} == {kernel}
    assert any("before its griddepcontrol.wait" in f.detail for f in found)

"""A model's forward and backward pass: nothing is read, nothing uploaded, and every gradient is where it belongs."""

from __future__ import annotations

import pytest
import torch
from fake_gpu.budgets import CACHE, NONE
from fake_gpu.device import h100
from fake_gpu.scenario import ids, model
from fake_gpu.trace import watching

from fastgpt import KVCache, use_backend
from fastgpt.graphs import capture

DTYPES = [
    ("bfloat16", "auto", False),
    ("float16", "triton", False),
    ("float32", "triton", False),
    ("float32", "auto", True),
    ("float64", "auto", False),
    ("bfloat16", "reference", False),
    ("float32", "reference", True),
]

VARIANTS = [
    {},
    {"norm_position": "post", "activation": "relu", "bias": False},
    {"tie_weights": False, "head_bias": True},
    {"vocab_multiple": 64},
    {"causal": False},
    {"activation": "gelu", "qkv_bias": False},
]


def trained_once(net, autocast):
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = net.loss(ids(2, 128), ids(2, 128))
    loss.backward()
    return loss


def check_gradients(net):
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.device, p.grad.shape, p.grad.dtype) == (p.device, p.shape, p.dtype), name


@pytest.mark.parametrize("launchers", [True, False], ids=["launchers", "shapes alone"])
@pytest.mark.parametrize(("dtype", "backend", "autocast"), DTYPES)
def test_loss_and_backward(dtype, backend, autocast, launchers):
    with h100(launchers=launchers), use_backend(backend):
        net = model(getattr(torch, dtype), train=True, drop_rate=0.1)
        with watching() as seen:
            trained_once(net, autocast)
        NONE.check(seen)
        check_gradients(net)
        assert bool(seen.kernels) == (launchers and backend != "reference" and dtype != "float64")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant(variant):
    with h100():
        net = model(train=True, **{"drop_rate": 0.1, **variant})
        with watching() as seen:
            trained_once(net, False)
            net.eval()
            with torch.no_grad():
                assert net(ids(2, 16)).shape == (2, 16, 50257)
        NONE.check(seen)
        check_gradients(net)


@pytest.mark.parametrize(("dtype", "backend", "autocast"), DTYPES)
def test_a_graph_holds_forward_and_backward(dtype, backend, autocast):
    """Whatever backend; so users may capture a model themselves."""
    with h100(), use_backend(backend):
        net = model(getattr(torch, dtype), train=True, drop_rate=0.1)
        idx = ids(2, 128)

        def run():
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
                net.loss(idx, idx).backward()

        with watching() as seen:
            replay, _ = capture(run, idx.device)
            replay()
        NONE._replace(captures=1).check(seen)


def test_evaluation_of_logits_and_maps():
    with h100():
        net = model()
        with watching() as seen:
            assert net.attention_weights(ids(1, 8)).shape == (2, 1, 12, 8, 8)
        NONE.check(seen)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cache(backend):
    with h100(), use_backend(backend), torch.no_grad():
        net = model()
        with watching() as seen:
            cache = KVCache(net.config, 2, 64, torch.bfloat16, "cuda")
        CACHE["made"].check(seen)
        for rows in (4, 1, 1):
            with watching() as seen:
                net(ids(2, rows), cache)
            CACHE["forward"].check(seen)
        with watching() as seen:
            cache.truncate([2, 3])
        CACHE["truncated"].check(seen)
        for rows in (1, 3):
            with watching() as seen:
                net(ids(2, rows), cache)
            CACHE["forward, rows of several lengths"].check(seen)

"""State dicts and checkpoints of the book, both ways."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from book_models import T, V, ch04, ch05, ids, same_logits, twins
from models import TINY, spread
from torch import nn

from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import GPTModel


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_state_dicts_load_strictly_both_ways(qkv_bias):
    upstream, model = twins(qkv_bias=qkv_bias)
    assert list(model.state_dict(masks=True)) == list(upstream.state_dict())
    assert not [name for name in model.state_dict() if name.endswith("mask")]
    other, _ = twins(seed=5, qkv_bias=qkv_bias)
    other.load_state_dict(model.state_dict(masks=True))
    same_logits(other, upstream)
    other, _ = twins(seed=6, qkv_bias=qkv_bias)
    model.load_state_dict(other.state_dict())
    same_logits(model, other)
    bare = {name: tensor for name, tensor in other.state_dict().items() if not name.endswith("mask")}
    fresh = GPTModel(model.cfg).eval()
    fresh.load_state_dict(bare)
    same_logits(fresh, other)
    with pytest.raises(RuntimeError, match=r"Missing key.*out_head.weight"):
        fresh.load_state_dict({name: tensor for name, tensor in bare.items() if name != "out_head.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*att.masks"):
        fresh.load_state_dict({**bare, "trf_blocks.0.att.masks": torch.zeros(1)})


def test_masks_are_upstreams_share_memory_and_follow_the_dtype(tmp_path):
    _, model = twins()
    upstream = ch04.GPTModel(TINY).bfloat16()
    state, expected = model.bfloat16().state_dict(masks=True), upstream.state_dict()
    for i in range(2):
        name = f"trf_blocks.{i}.att.mask"
        assert torch.equal(state[name], expected[name])
        assert state[name].dtype == expected[name].dtype
    assert state["trf_blocks.0.att.mask"].data_ptr() == state["trf_blocks.1.att.mask"].data_ptr()
    torch.save(state, tmp_path / "model.pth")
    upstream.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert "trf_blocks.1.att.mask" not in GPTModel(TINY, disable_causal_mask=True).state_dict(masks=True)
    nested = nn.ModuleDict({"gpt": model})
    assert list(model.state_dict(prefix="gpt.")) == list(nested.state_dict())
    assert list(model.state_dict(prefix="gpt.", masks=True))[2] == "gpt.trf_blocks.0.att.mask"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoints_of_wrapped_models_load(prefix):
    upstream, model = twins()
    fresh = GPTModel(TINY).eval()
    fresh.load_state_dict({prefix + name: tensor for name, tensor in upstream.state_dict().items()})
    same_logits(fresh, upstream)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_orig_mod"):
        fresh.load_state_dict({**model.state_dict(), "_orig_mod.out_head.weight": torch.zeros(V, 32)})


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_checkpoints_of_upstreams_fast_model_load(qkv_bias):
    cfg = {**TINY, "qkv_bias": qkv_bias}
    upstream = ch04.GPTModelFast(cfg).eval()
    spread(upstream)
    model = book.GPTModelFast(cfg).eval()
    model.load_state_dict(upstream.state_dict())
    same_logits(model, upstream)
    model.load_state_dict({f"_orig_mod.{name}": tensor for name, tensor in upstream.state_dict().items()})
    same_logits(model, upstream)
    with pytest.raises(RuntimeError, match="Missing key"):
        GPTModel(TINY).load_state_dict({"trf_blocks.0.att.qkv.weight": torch.zeros(96, 32)})


def test_fast_model_of_the_same_seed_has_upstreams_logits_without_qkv_bias():
    cfg = {**TINY, "qkv_bias": False}
    torch.manual_seed(3)
    upstream = ch04.GPTModelFast(cfg).eval()
    torch.manual_seed(3)
    same_logits(book.GPTModelFast(cfg).eval(), upstream)


def test_meta_device_assign_and_to_empty():
    upstream, source = twins()
    with torch.device("meta"):
        assigned, emptied = GPTModel(TINY).eval(), GPTModel(TINY).eval()
    assigned.load_state_dict(upstream.state_dict(), assign=True)
    same_logits(assigned, upstream)
    assert assigned.tok_emb.weight.data_ptr() == upstream.tok_emb.weight.data_ptr()
    emptied = emptied.to_empty(device="cpu")
    emptied.load_state_dict(upstream.state_dict())
    same_logits(emptied, upstream)
    # after a cached run, whose packed view of the old parameters must not survive
    book.generate_text_simple_cached(source, ids(1, 4), 4)
    spread(upstream)
    source.load_state_dict(copy.deepcopy(upstream.state_dict()), assign=True)
    expected = ch04.generate_text_simple(upstream, ids(1, 4), 8, T)
    assert torch.equal(book.generate_text_simple_cached(source, ids(1, 4), 8), expected)


def params_tree(seed=0, layers=2, C=32):
    """OpenAI's weights as the book's download_and_load_gpt2 gives them, at random and asymmetric."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return (0.3 * random.standard_normal(shape)).astype(np.float32)

    def block():
        return {
            "attn": {"c_attn": {"w": draw(C, 3 * C), "b": draw(3 * C)}, "c_proj": {"w": draw(C, C), "b": draw(C)}},
            "mlp": {"c_fc": {"w": draw(C, 4 * C), "b": draw(4 * C)}, "c_proj": {"w": draw(4 * C, C), "b": draw(C)}},
            "ln_1": {"g": 1 + draw(C), "b": draw(C)},
            "ln_2": {"g": 1 + draw(C), "b": draw(C)},
        }

    blocks = [block() for _ in range(layers)]
    return {"blocks": blocks, "wte": draw(V, C), "wpe": draw(T, C), "g": 1 + draw(C), "b": draw(C)}


@pytest.mark.parametrize("load", [book.load_weights_into_gpt, ch05.load_weights_into_gpt], ids=["ours", "upstreams"])
def test_load_weights_into_gpt_is_upstreams(load):
    upstream, model = twins()
    book.generate_text_simple_cached(model, ids(1, 4), 4)  # so that anything kept from the old parameters would show
    params = params_tree()
    ch05.load_weights_into_gpt(upstream, params)
    load(model, params)
    same_logits(model, upstream)
    assert isinstance(model.trf_blocks[1].att.W_query.weight, nn.Parameter)
    expected = ch04.generate_text_simple(upstream, ids(2, 4), 20, T)
    assert torch.equal(book.generate_text_simple_cached(model, ids(2, 4), 20), expected)
    book.load_weights_into_gpt(upstream, params_tree(seed=1))
    load(model, params_tree(seed=1))
    same_logits(model, upstream)
    params["wte"][:] = 0.0
    assert model.tok_emb.weight.any()  # a copy, not the arrays' memory


def test_load_weights_names_everything_that_doesnt_fit_and_assigns_nothing():
    model = GPTModel({**TINY, "qkv_bias": False})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)in 6 places.*no trf_blocks.0.att.W_query.bias"):
        book.load_weights_into_gpt(model, params_tree())
    with pytest.raises(ValueError, match=r"pos_emb.weight is \[20, 32\] in the model, \[16, 32\] in params"):
        book.load_weights_into_gpt(GPTModel({**TINY, "context_length": 20}), params_tree())
    with pytest.raises(ValueError, match=r"nothing for trf_blocks\.2"):
        book.load_weights_into_gpt(GPTModel({**TINY, "n_layers": 3}), params_tree())
    broken = params_tree()
    del broken["blocks"][1]["mlp"]["c_fc"]["w"]
    with pytest.raises(ValueError, match="h1/mlp/c_fc/w"):
        book.load_weights_into_gpt(GPTModel(TINY), broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_assign():
    left = nn.Parameter(torch.zeros(2, 3))
    right = np.arange(6, dtype=np.float32).reshape(3, 2).T
    got = book.assign(left, right)
    assert isinstance(got, nn.Parameter)
    assert torch.equal(got, ch05.assign(left, right))
    again = book.assign(left, got)
    assert torch.equal(again, got)
    assert again.data_ptr() != got.data_ptr()
    right[:] = 0.0
    assert got.any()  # a copy
    with pytest.raises(ValueError, match=r"Shape mismatch. Left: \(2, 3\), Right: \(3, 2\)"):
        book.assign(left, right.T)

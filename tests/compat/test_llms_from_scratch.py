"""fastgpt.compat.llms_from_scratch beside the package llms_from_scratch, whose names, numbers and tokens it must have."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, spread
from torch import nn

import fastgpt
from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import GPTModel, KVCache

ch02, ch04, ch05, appendix_e, kv_cache = (
    pytest.importorskip(f"llms_from_scratch.{name}", reason="needs llms_from_scratch and matplotlib, which it imports")
    for name in ("ch02", "ch04", "ch05", "appendix_e", "kv_cache.utils")
)
LinearWithLoRA, replace_linear_with_lora = appendix_e.LinearWithLoRA, appendix_e.replace_linear_with_lora

ROOT = Path(__file__).parent.parent.parent
V, T = TINY["vocab_size"], TINY["context_length"]
ATOL = 2e-5  # fp32 beside fp32; two formulations of upstream's own model differ by 2e-6


def twins(seed=123, kind=ch04.GPTModel, **changes):
    """(upstream, ours) with the same weights, away from their initial values, in eval mode."""
    cfg = {**TINY, **changes}
    torch.manual_seed(seed)
    upstream = kind(cfg).eval()
    spread(upstream)
    model = GPTModel(cfg).eval()
    model.load_state_dict(upstream.state_dict())
    return upstream, model


def ids(*shape, seed=1):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def same_logits(model, upstream, idx=None):
    idx = ids(2, 9) if idx is None else idx
    torch.testing.assert_close(model(idx), upstream(idx), rtol=0, atol=ATOL)


def margins(model, tokens, start, context=T):
    """The smallest lead of a greedy choice over the next best, for tokens from position `start` on."""
    leads = []
    for end in range(start, tokens.shape[1]):
        best = model(tokens[:, max(end - context, 0) : end])[:, -1].topk(2).values
        leads.append((best[:, 0] - best[:, 1]).min().item())
    return min(leads)


class Letters:
    """A tokenizer with the two methods that the book uses."""

    def encode(self, text, allowed_special=None):
        return [ord(character) % V for character in text]

    def decode(self, tokens):
        return "".join(chr(33 + token) for token in tokens)


# Construction


def test_seven_keys_and_others_ignored():
    plain = GPTModel(TINY)
    torch.manual_seed(0)
    plain = GPTModel(TINY)
    torch.manual_seed(0)
    more = GPTModel({**TINY, "kv_window_size": 4, "activation": "relu"})
    assert torch.equal(plain(ids(1, 5)), more(ids(1, 5)))
    assert more.cfg["kv_window_size"] == 4
    assert plain.cfg == TINY
    assert GPTModel(plain.config).cfg == TINY
    assert book.GPTModelFast is GPTModel


@pytest.mark.parametrize("key", TINY)
def test_missing_key_is_named(key):
    with pytest.raises(KeyError, match=key):
        GPTModel({name: value for name, value in TINY.items() if name != key})


def test_heads_that_dont_divide_are_an_assertion_error():
    with pytest.raises(AssertionError, match=r"emb_dim=32 and n_heads=5"):
        GPTModel({**TINY, "n_heads": 5})


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_same_seed_gives_upstreams_parameters_and_random_state(qkv_bias):
    cfg = {**TINY, "qkv_bias": qkv_bias}
    torch.manual_seed(7)
    expected, after = dict(ch04.GPTModel(cfg).named_parameters()), torch.rand(3)
    torch.manual_seed(7)
    got = dict(GPTModel(cfg).named_parameters())
    assert torch.equal(torch.rand(3), after)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_golden_ids_of_upstreams_own_test():
    # pkg/llms_from_scratch/tests/test_ch04.py: seed 123, the 124M configuration, ten greedy tokens after "Hello, I am"
    torch.manual_seed(123)
    model = GPTModel(
        {**TINY, "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
        | {"drop_rate": 0.1, "qkv_bias": False}
    ).eval()
    prompt = torch.tensor([[15496, 11, 314, 716]])
    expected = [27018, 24086, 47843, 30961, 42348, 7267, 49706, 43231, 47062, 34657]
    assert (
        book.generate_text_simple(model=model, idx=prompt, max_new_tokens=10, context_size=1024)[0, 4:].tolist()
        == expected
    )
    cached = book.generate_text_simple_cached(model=model, idx=prompt, max_new_tokens=10, context_size=1024)
    assert cached[0, 4:].tolist() == expected
    streamed = book.generate_text_simple_stream(model, prompt, 10, context_size=1024)
    assert torch.cat(list(streamed), dim=1)[0].tolist() == expected


# Numbers


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("B", [1, 2, 5])
def test_logits_are_upstreams(qkv_bias, B):
    upstream, model = twins(qkv_bias=qkv_bias)
    for length in (1, 2, 7, 15, 16):
        idx = ids(B, length)
        same_logits(model, upstream, idx)
        assert torch.equal(model(idx.int()), model(idx))
    same_logits(model, upstream, ids(B, 30)[:, ::2])
    same_logits(model.train(), upstream.train())


@pytest.mark.parametrize(
    "changes",
    [
        {"emb_dim": 96, "n_heads": 3},
        {"emb_dim": 64, "n_heads": 1},
        {"vocab_size": 1000, "context_length": 64, "emb_dim": 128, "n_layers": 3},
    ],
    ids=str,
)
def test_logits_are_upstreams_in_other_shapes(changes):
    upstream, model = twins(**changes)
    same_logits(model, upstream, ids(2, 16))


def test_float64_and_bfloat16_are_as_near_the_truth_as_upstream():
    upstream, model = twins()
    idx = ids(2, 12)
    truth = copy.deepcopy(upstream).double()(idx)
    torch.testing.assert_close(
        copy.deepcopy(model).double()(idx), truth, rtol=0, atol=1e-6
    )  # upstream's GELU rounds in fp32
    theirs = (upstream.bfloat16()(idx).double() - truth).abs()
    mine = (model.bfloat16()(idx).double() - truth).abs()
    assert mine.max() <= 2 * theirs.max()
    assert mine.square().mean() <= 2 * theirs.square().mean()


def test_dropout_draws_upstreams_masks():
    upstream, model = twins(drop_rate=0.2)
    torch.manual_seed(5)
    expected = upstream.train()(ids(3, 12))
    torch.manual_seed(5)
    torch.testing.assert_close(model.train()(ids(3, 12)), expected, rtol=0, atol=ATOL)


def test_dropout_of_one_leaves_the_final_norms_shift_and_eval_untouched():
    upstream, model = twins(drop_rate=1.0)
    same_logits(model, upstream)
    expected = F.linear(model.final_norm.shift, model.out_head.weight).expand(2, 9, V)
    torch.testing.assert_close(model.train()(ids(2, 9)), expected)


def test_dropout_keeps_means_and_scales_variance():
    model = GPTModel({**TINY, "drop_rate": 0.1, "n_layers": 1, "emb_dim": 512}).train()
    with torch.no_grad():
        kept = model.drop_emb(torch.ones(200_000))
        branch = model.trf_blocks[0].drop_shortcut(torch.ones(200_000))
    for sample in (kept, branch):
        assert sample.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.1 / 0.9 / 200_000))
        assert (sample == 0).float().mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 200_000))
    x = ids(64, 16)
    torch.manual_seed(0)
    zeros = (model._embed(x, 0) == 0).float().mean().item()
    assert zeros == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / (64 * 16 * 512)))


@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (torch.zeros(1, T + 1, dtype=torch.long), r"17 positions .* context length 16"),
        (torch.tensor([[0, V]]), r"token id 101 is outside the vocabulary of 101"),
        (torch.tensor([[-1]]), r"token id -1"),
    ],
)
def test_ids_out_of_range_are_index_and_value_errors(idx, message):
    model = GPTModel(TINY)
    for kind in (IndexError, ValueError):
        for call in (model, lambda x: model(x, use_cache=True), lambda x: model(x, cache=KVCache(2))):
            with pytest.raises(kind, match=message):
                call(idx)
    model.reset_kv_cache()


@pytest.mark.parametrize("ignored", ["none", "some"])
def test_loss_and_gradients_are_upstreams(ignored):
    upstream, model = twins(drop_rate=0.0)
    inputs, targets = ids(3, 12), ids(3, 12, seed=2)
    if ignored == "some":
        targets[0, :5] = targets[2] = -100
    expected = ch05.calc_loss_batch(inputs, targets, upstream, "cpu")
    expected.backward()
    loss = book.calc_loss_batch(inputs, targets, model, "cpu")
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_loss_of_a_batch_without_targets_is_nan_as_upstreams():
    upstream, model = twins()
    nothing = torch.full((2, 5), -100)
    assert ch05.calc_loss_batch(ids(2, 5), nothing, upstream, "cpu").isnan()
    assert book.calc_loss_batch(ids(2, 5), nothing, model, "cpu").isnan()


def test_loss_of_a_hooked_model_is_of_what_its_hook_returns():
    _, model = twins()
    before = book.calc_loss_batch(ids(2, 5), ids(2, 5), model, "cpu")
    model.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert book.calc_loss_batch(ids(2, 5), ids(2, 5), model, "cpu").item() == pytest.approx(math.log(V))
    assert before.item() != pytest.approx(math.log(V))


# Checkpoints


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


# What the book does to a model


def test_assigned_parameters_are_used_by_the_next_call_cached_or_not():
    upstream, model = twins()
    book.generate_text_simple_cached(model, ids(1, 4), 4)
    for i, name in enumerate(("W_query", "W_key", "W_value", "out_proj")):
        weight = 0.2 * torch.randn(32, 32)
        for gpt in (upstream, model):
            getattr(gpt.trf_blocks[i % 2].att, name).weight = nn.Parameter(weight.clone())
        same_logits(model, upstream)
    expected = ch04.generate_text_simple(upstream, ids(1, 4), 10, T)
    assert torch.equal(book.generate_text_simple_cached(model, ids(1, 4), 10), expected)


@pytest.mark.parametrize("classes", [2, 150])
def test_classifier_as_in_chapter_6(classes):
    upstream, model = twins()
    for gpt in (upstream, model):
        for parameter in gpt.parameters():
            parameter.requires_grad = False
        torch.manual_seed(123)
        gpt.out_head = nn.Linear(in_features=32, out_features=classes)
        for part in (gpt.trf_blocks[-1], gpt.final_norm):
            for parameter in part.parameters():
                parameter.requires_grad = True
    assert model(ids(4, 6)).shape == (4, 6, classes)
    same_logits(model, upstream)
    labels = torch.tensor([0, 1, 1, 0])
    for gpt in (upstream, model):
        F.cross_entropy(gpt(ids(4, 6))[:, -1, :], labels).backward()
    theirs = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(("trf_blocks.1.", "final_norm.", "out_head.")):
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
        else:
            assert parameter.grad is None, name
    optimizers = [torch.optim.AdamW(gpt.parameters(), lr=1e-3, weight_decay=0.1) for gpt in (upstream, model)]
    for gpt, optimizer in zip((upstream, model), optimizers, strict=True):
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(gpt(ids(4, 6, seed=step))[:, -1, :], labels).backward()
            optimizer.step()
    torch.testing.assert_close(model(ids(2, 9)), upstream(ids(2, 9)), rtol=0, atol=1e-3)


def test_lora_as_in_appendix_e():
    upstream, model = twins()
    for gpt in (upstream, model):
        torch.manual_seed(9)
        replace_linear_with_lora(gpt, rank=3, alpha=4)
    adapted = [module for module in model.modules() if isinstance(module, LinearWithLoRA)]
    assert len(adapted) == 13
    before = model(ids(2, 9))
    same_logits(model, upstream)
    for gpt in (upstream, model):
        torch.manual_seed(10)
        for module in gpt.modules():
            if isinstance(module, LinearWithLoRA):
                nn.init.normal_(module.lora.B, std=0.1)
    assert (model(ids(2, 9)) - before).abs().max() > 0.1
    same_logits(model, upstream)
    assert list(model.state_dict(masks=True)) == list(upstream.state_dict())
    expected = ch04.generate_text_simple(upstream, ids(2, 9), 20, T)
    assert torch.equal(book.generate_text_simple(model, ids(2, 9), 20, T), expected)
    for gpt in (upstream, model):
        ch05.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), gpt, "cpu").backward()
    theirs = {name: parameter.grad for name, parameter in upstream.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_vocabulary_extended_as_in_chapter_5s_bonus():
    upstream, model = twins()
    for gpt in (upstream, model):
        torch.manual_seed(4)
        tokens, head = nn.Embedding(V + 2, 32), nn.Linear(32, V + 2, bias=False)
        with torch.no_grad():
            tokens.weight[:V], head.weight[:V] = gpt.tok_emb.weight, gpt.out_head.weight
        gpt.tok_emb, gpt.out_head = tokens, head
    idx = torch.tensor([[3, V, 5, V + 1]])
    same_logits(model, upstream, idx)
    assert torch.equal(book.generate_text_simple(model, idx, 20, T), ch04.generate_text_simple(upstream, idx, 20, T))
    expected = ch05.calc_loss_batch(idx, idx, upstream, "cpu")
    torch.testing.assert_close(book.calc_loss_batch(idx, idx, model, "cpu"), expected)
    with pytest.raises(IndexError, match="token id 103 is outside the vocabulary of 103"):
        model(torch.tensor([[103]]))


def test_without_the_causal_mask_every_position_attends_to_every_other():
    upstream, _ = twins()
    model = GPTModel(TINY, disable_causal_mask=True).eval()
    model.load_state_dict(upstream.state_dict())
    for block in upstream.trf_blocks:
        block.att.mask.zero_()  # what leaving the masking out comes to
    same_logits(model, upstream)
    expected = ch04.generate_text_simple(upstream, ids(2, 9), 12, T)
    assert torch.equal(book.generate_text_simple(model, ids(2, 9), 12, T), expected)
    with pytest.raises(ValueError, match="causal=False has no KV cache"):
        book.generate_text_simple_cached(model, ids(1, 4), 4)


# Generation


@pytest.mark.parametrize(("start", "count"), [(1, 15), (5, 40), (16, 5), (23, 8)])
@pytest.mark.parametrize("context", [T, 7])
def test_generate_text_simple_is_upstreams_inside_and_past_the_context(start, count, context):
    upstream, model = twins()
    idx = ids(3, start)
    expected = ch04.generate_text_simple(upstream, idx, count, context)
    assert margins(upstream, expected, start, context) > 1e-4
    assert torch.equal(book.generate_text_simple(model, idx, count, context), expected)
    for use_cache in (True, False):
        assert torch.equal(book.generate_text_simple_cached(model, idx, count, context, use_cache), expected)
    assert torch.equal(book.generate(model, idx, count, context), expected)
    streamed = list(book.generate_text_simple_stream(model, idx, count, context_size=context))
    assert torch.equal(torch.cat((idx, *streamed), dim=1), expected)


def test_left_out_context_size_is_the_models():
    upstream, model = twins()
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 30, T)
    assert torch.equal(book.generate_text_simple_cached(model, ids(2, 5), 30), expected)
    streamed = list(book.generate_text_simple_stream(model, ids(2, 5), 30))
    assert torch.equal(torch.cat(streamed, dim=1), expected[:, 5:])


def test_prompt_of_several_prefill_chunks(monkeypatch):
    upstream, model = twins()
    lengths = []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("fastgpt.compat.llms_from_scratch.generation.PREFILL_CHUNK", 4)
    got = book.generate_text_simple(model, ids(2, 10), 6, T)
    assert lengths == [4, 4, 2, 1, 1, 1, 1, 1]
    assert torch.equal(got, ch04.generate_text_simple(upstream, ids(2, 10), 6, T))


@pytest.mark.parametrize("options", [{"top_k": 20}, {}, {"top_k": 1}, {"top_k": V}], ids=str)
def test_sampling_draws_upstreams_tokens(options):
    upstream, model = twins()
    torch.manual_seed(11)
    expected = ch05.generate(upstream, ids(1, 5), 40, T, temperature=0.9, **options)
    torch.manual_seed(11)
    assert torch.equal(book.generate(model, ids(1, 5), 40, T, temperature=0.9, **options), expected)


def test_sampling_a_batch_with_top_k_stays_among_the_k_best():
    upstream, model = twins()
    torch.manual_seed(2)
    out = book.generate(model, ids(4, 5), 30, T, temperature=1.5, top_k=3)  # upstream raises here
    ranks = []
    for end in range(5, 35):
        logits = upstream(out[:, max(end - T, 0) : end])[:, -1]
        ranks.append((logits > logits.gather(1, out[:, end : end + 1])).sum(dim=1))
    ranks = torch.stack(ranks)
    assert ranks.max() == 2
    assert (ranks > 0).any()
    torch.manual_seed(2)
    many = book.generate(model, ids(2, 5), 10, T, temperature=1.0, top_k=10**6)  # upstream raises here too
    torch.manual_seed(2)
    assert torch.equal(many, book.generate(model, ids(2, 5), 10, T, temperature=1.0))


def test_eos_ends_one_row_as_upstream_does():
    upstream, model = twins()
    free = ch05.generate(upstream, ids(1, 5), 30, T)
    eos = free[0, 15].item()
    expected = ch05.generate(upstream, ids(1, 5), 30, T, eos_id=eos)
    got = book.generate(model, ids(1, 5), 30, T, eos_id=eos)
    assert torch.equal(got, expected)
    assert eos not in got[0, 5:].tolist()
    streamed = list(book.generate_text_simple_stream(model, ids(1, 5), 30, eos_token_id=eos))
    assert torch.equal(torch.cat((ids(1, 5), *streamed), dim=1), expected)


def test_eos_in_a_batch_fills_the_rows_that_ended_before():
    upstream, model = twins()
    free = ch05.generate(upstream, ids(3, 5), 30, T)[:, 5:].tolist()
    eos = next(t for t in range(V) if sum(t in row for row in free) == 3 and len({row.index(t) for row in free}) > 1)
    ends = [row.index(eos) for row in free]
    out = book.generate(model, ids(3, 5), 30, T, eos_id=eos)[:, 5:]
    assert out.shape[1] == max(ends)
    for row, end, tokens in zip(free, ends, out.tolist(), strict=True):
        assert tokens == row[:end] + [eos] * (max(ends) - end)


def test_a_model_in_training_mode_generates_with_dropout_as_upstreams():
    upstream, model = twins(drop_rate=0.2)
    upstream.train(), model.train()
    torch.manual_seed(8)
    expected = ch05.generate(upstream, ids(1, 5), 20, T, temperature=1.0)
    torch.manual_seed(8)
    assert torch.equal(book.generate(model, ids(1, 5), 20, T, temperature=1.0), expected)
    assert model.training


def test_other_models_are_called_for_each_token():
    upstream, _ = twins()
    expected = ch05.generate(upstream, ids(3, 5), 20, T)
    assert torch.equal(book.generate(upstream, ids(3, 5), 20, T), expected)
    assert torch.equal(book.generate(lambda idx: upstream(idx), ids(3, 5), 20, T), expected)
    assert torch.equal(book.generate_text_simple_cached(upstream, ids(3, 5), 20, use_cache=False), expected)
    for run in (book.generate_text_simple_cached, book.generate_text_simple_stream):
        with pytest.raises(TypeError, match="needs a GPTModel of fastgpt, got GPTModel"):
            run(upstream, ids(3, 5), 20)


class Doubled(GPTModel):
    def forward(self, in_idx):
        return -super().forward(in_idx)


def test_a_subclass_with_its_own_forward_is_called_through_it():
    upstream, _ = twins()
    model = Doubled(TINY).eval()
    model.load_state_dict(upstream.state_dict())
    expected = ch04.generate_text_simple(lambda idx: -upstream(idx), ids(2, 5), 20, T)
    assert torch.equal(book.generate_text_simple(model, ids(2, 5), 20, T), expected)
    expected = F.cross_entropy(-upstream(ids(2, 5)).flatten(0, 1), ids(2, 5).flatten())
    torch.testing.assert_close(book.calc_loss_batch(ids(2, 5), ids(2, 5), model, "cpu"), expected)


@pytest.mark.parametrize("base", [fastgpt.GPTModel, GPTModel])
def test_fastgpts_own_generate_and_model_agree(base):
    upstream, _ = twins()
    model = base(TINY).eval()
    model.load_state_dict(upstream.state_dict())
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 30, T)
    assert torch.equal(model.generate(ids(2, 5), 30), expected)
    assert torch.equal(book.generate_text_simple_cached(model, ids(2, 5), 30), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: book.generate_text_simple(m, ids(1, 4), -1, T), "max_new_tokens must be .* at least 0, got -1"),
        (lambda m: book.generate_text_simple(m, ids(1, 4), 1, 0), "context_size must be .* at least 1, got 0"),
        (lambda m: book.generate_text_simple(m, ids(4), 1, T), r"ids must be \[B, T\].*got \[4\]"),
        (lambda m: book.generate(m, ids(1, 4), 1, T, temperature=-1.0), "temperature must be .* got -1.0"),
        (lambda m: book.generate(m, ids(1, 4), 1, T, top_k=0), "top_k must be .* got 0"),
        (lambda m: book.generate_text_simple_stream(m, ids(1, 4), 2.5), "max_new_tokens must be .* got 2.5"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(GPTModel(TINY).eval())


def test_context_size_over_the_models_fails_where_upstream_fails():
    upstream, model = twins()
    assert torch.equal(
        book.generate_text_simple(model, ids(1, 10), 6, 99), ch04.generate_text_simple(upstream, ids(1, 10), 6, 99)
    )
    for generate, gpt in ((ch04.generate_text_simple, upstream), (book.generate_text_simple, model)):
        with pytest.raises(IndexError):
            generate(gpt, ids(1, 10), 8, 99)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    _, model = twins()
    with torch.no_grad():
        model.final_norm.shift.fill_(bad)
    with pytest.raises(ValueError, match="NaN or Inf after 4 tokens"):
        book.generate_text_simple(model, ids(1, 4), 5, T)


def test_text_and_tokens():
    tokens = book.text_to_token_ids("Every effort", Letters())
    assert torch.equal(tokens, ch05.text_to_token_ids("Every effort", Letters()))
    assert tokens.dtype == torch.int64
    assert book.token_ids_to_text(tokens, Letters()) == ch05.token_ids_to_text(tokens, Letters())
    assert book.token_ids_to_text(tokens[0], Letters()) == ch05.token_ids_to_text(tokens[0], Letters())
    assert torch.equal(book.text_to_token_ids("", Letters()), torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[2, 3\]; decode one row at a time"):
        book.token_ids_to_text(ids(2, 3), Letters())


# The cache


def caches(kind, model):
    """A way of calling model with a fresh cache of one of the four kinds."""
    if kind == "own":
        model.reset_kv_cache()
        return lambda idx: model(idx, use_cache=True)
    cache = {"ours": KVCache, "upstreams": kv_cache.KVCache}[kind](n_layers=2)
    return lambda idx: model(idx, cache=cache)


KINDS = ["own", "ours", "upstreams"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_chunks_of_any_size_give_the_uncached_logits(kind, chunk):
    upstream, model = twins()
    idx = ids(2, T)
    call = caches(kind, model)
    with torch.no_grad():
        got = torch.cat([call(part) for part in idx.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(got, upstream(idx), rtol=0, atol=ATOL)
    with pytest.raises(IndexError, match=r"17 positions \(16 cached, 1 new\)"), torch.no_grad():
        call(idx[:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_calls_with_and_without_a_cache_alternate(kind):
    upstream, model = twins()
    idx, other = ids(2, 12), ids(3, 5, seed=2)
    call = caches(kind, model)
    with torch.no_grad():
        call(idx[:, :8])
        same_logits(model, upstream, other)
        torch.testing.assert_close(call(idx[:, 8:]), upstream(idx)[:, 8:], rtol=0, atol=ATOL)
        book.generate_text_simple_cached(model, other, 4)  # has a cache of its own
        second = caches("ours", model)
        torch.testing.assert_close(second(other), upstream(other), rtol=0, atol=ATOL)
        torch.testing.assert_close(
            call(other[:2, :1])[:, 0], upstream(torch.cat((idx, other[:2, :1]), 1))[:, -1], rtol=0, atol=ATOL
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_books_cached_loop_works_past_a_reset_and_with_other_batch_sizes(kind):
    upstream, model = twins()
    for B, start, count in ((2, 5, 11), (3, 3, 7), (1, 12, 4)):
        idx = ids(B, start)
        expected = ch04.generate_text_simple(upstream, idx, count, T)
        call = caches(kind, model)
        with torch.no_grad():
            logits = call(idx)
            for step in range(count):
                idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
                if step < count - 1:
                    logits = call(idx[:, -1:])
        assert torch.equal(idx, expected)


def test_another_batch_size_or_dtype_without_a_reset_is_named():
    _, model = twins()
    with torch.no_grad():
        model(ids(2, 4), use_cache=True)
        with pytest.raises(ValueError, match=r"\(2, torch.float32, .* this call \(3, torch.float32,.*reset_kv_cache"):
            model(ids(3, 1), use_cache=True)
        model.bfloat16()
        with pytest.raises(ValueError, match=r"torch.float32.*this call.*torch.bfloat16"):
            model(ids(2, 1), use_cache=True)
        model.reset_kv_cache()
        assert model(ids(3, 1), use_cache=True).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [KVCache, kv_cache.KVCache])
def test_cache_entries_may_be_read_reordered_cut_and_restored(kind):
    upstream, model = twins()
    idx, new = ids(3, 6), ids(3, 2, seed=2)
    cache = kind(2)
    assert cache.get_all() == [None, None]
    with torch.no_grad():
        model(idx, cache=cache)
        keys, values = cache.get(1)
        assert keys.shape == values.shape == (3, 4, 6, 8)
        block = model.trf_blocks[0]
        x = block.norm1(model.tok_emb(idx) + model.pos_emb(torch.arange(6)))
        torch.testing.assert_close(cache.get(0)[0], block.att.W_key(x).view(3, 6, 4, 8).transpose(1, 2))
        saved = list(cache.get_all())
        model(new[:, :1], cache=cache)
        assert cache.get(0)[0].shape[2] == 7

        order = torch.tensor([2, 0, 0])
        for layer, (k, v) in enumerate(saved):
            cache.update(layer, (k[order], v[order]))
        expected = upstream(torch.cat((idx[order], new), dim=1))[:, -2:]
        torch.testing.assert_close(model(new, cache=cache), expected, rtol=0, atol=ATOL)

        for layer, (k, v) in enumerate(saved):
            cache.update(layer, (k[:, :, :4], v[:, :, :4]))
        expected = upstream(torch.cat((idx[:, :4], new), dim=1))[:, -2:]
        torch.testing.assert_close(model(new, cache=cache), expected, rtol=0, atol=ATOL)

        cache.reset()
        assert cache.get_all() == [None, None]
        torch.testing.assert_close(model(new, cache=cache), upstream(new), rtol=0, atol=ATOL)


def test_a_cache_is_as_before_after_a_call_that_failed_half_way():
    upstream, model = twins()

    def fail(module, args):
        raise KeyboardInterrupt

    cache = KVCache(2)
    with torch.no_grad():
        model(ids(2, 5), cache=cache)
        hook = model.trf_blocks[1].att.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids(2, 3, seed=2), cache=cache)
        hook.remove()
        got = model(ids(2, 9)[:, 5:], cache=cache)
    assert cache.get(0)[0].shape[2] == 9
    expected = upstream(torch.cat((ids(2, 5), ids(2, 9)[:, 5:]), dim=1))[:, 5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)


def test_bad_caches_are_named():
    _, model = twins()
    with pytest.raises(ValueError, match="the cache has 3 layers, the model 2"):
        model(ids(1, 2), cache=KVCache(3))
    with pytest.raises(TypeError, match=r"cache must have get, update and get_all .* got dict"):
        model(ids(1, 2), cache={})
    cache = KVCache(2)
    cache.update(0, (torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8)))
    with pytest.raises(ValueError, match="in 1 of 2 layers"):
        model(ids(1, 2), cache=cache)
    cache.update(1, (torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)))
    with pytest.raises(ValueError, match=r"\[1, 4, S, 8\] of one S, got \[\(1, 4, 2, 8\), \(1, 4, 3, 8\)\]"):
        model(ids(1, 2), cache=cache)
    with torch.no_grad():
        model(ids(2, 3), cache=(filled := KVCache(2)))
        with pytest.raises(ValueError, match="the KV cache has 2 rows, idx has 1"):
            model(ids(1, 1), cache=filled)


def test_fastgpts_cache_is_taken_too():
    upstream, model = twins()
    cache = fastgpt.KVCache(model.config, 2)
    with torch.no_grad():
        model(ids(2, 9)[:, :5], cache=cache)
        got = model(ids(2, 9)[:, 5:], cache=cache)
    torch.testing.assert_close(got, upstream(ids(2, 9))[:, 5:], rtol=0, atol=ATOL)


@pytest.mark.parametrize("training", [True, False])
def test_cached_generation_leaves_every_modules_mode_alone(training):
    _, model = twins(drop_rate=0.5)
    reference = book.generate_text_simple_cached(model, ids(2, 5), 6)
    model.train(training)
    model.trf_blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(book.generate_text_simple_cached(model, ids(2, 5), 6), reference)
    stream = book.generate_text_simple_stream(model, ids(2, 5), 6)
    for step, token in enumerate(stream):
        assert torch.equal(token[:, 0], reference[:, 5 + step])
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cached_generation_in_other_dtypes(dtype):
    _, model = twins()
    model.to(dtype)
    expected = ch04.generate_text_simple(model, ids(2, 5), 25, T)  # upstream's loop, uncached
    if dtype == torch.float64:
        assert torch.equal(book.generate_text_simple_cached(model, ids(2, 5), 25), expected)
    with torch.no_grad():
        cache = KVCache(2)
        got = torch.cat([model(part, cache=cache) for part in ids(2, 14).split((6, 1, 7), dim=1)], dim=1)
    assert cache.get(0)[0].dtype == dtype
    error = (got - model(ids(2, 14))).abs().max().item()
    assert error <= 8 * torch.finfo(dtype).eps * model(ids(2, 14)).abs().max().item()


# Data and training


def loaders():
    train = [(ids(4, 12, seed=s), ids(4, 12, seed=s + 50)) for s in range(5)]
    return train, [(ids(4, 12, seed=99), ids(4, 12, seed=98))]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_train_model_simple_is_upstreams(optimizer, drop_rate, capsys):
    results = []
    train, val = loaders()
    for module, gpt in zip((ch05, book), twins(drop_rate=drop_rate), strict=True):
        torch.manual_seed(1)
        losses = module.train_model_simple(
            gpt, train, val, optimizer(gpt.parameters(), lr=1e-3), "cpu", 2, 2, 3, "Every effort moves you", Letters()
        )
        results.append((losses, capsys.readouterr().out))
    (expected, expected_text), (got, text) = results
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4)
    assert got[2] == expected[2]
    assert len(got[0]) == 5
    assert got[0][-1] < got[0][0]
    assert text.split("\n")[0] == expected_text.split("\n")[0]
    assert text.count("\n") == expected_text.count("\n") == 7


def test_losses_of_a_loader():
    upstream, model = twins()
    train, _ = loaders()
    for count in (None, 2, 99):
        expected = ch05.calc_loss_loader(train, upstream, "cpu", num_batches=count)
        assert book.calc_loss_loader(train, model, "cpu", num_batches=count) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(book.calc_loss_loader([], model, "cpu"))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_samples_restore_the_mode(training, capsys):
    upstream, model = twins(drop_rate=0.5)
    train, val = loaders()
    expected = ch05.evaluate_model(upstream, train, val, "cpu", 2)
    model.train(training)
    assert book.evaluate_model(model, train, val, "cpu", 2) == pytest.approx(expected, rel=1e-5)
    assert model.training is training
    ch05.generate_and_print_sample(upstream, Letters(), "cpu", "Hello\n you")
    expected = capsys.readouterr().out
    book.generate_and_print_sample(model, Letters(), "cpu", "Hello\n you")
    assert capsys.readouterr().out == expected
    assert model.training is training


def byte_encoding():
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"he": 257}
    return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (4, 4), (7, 3), (3, 9), (400, 5)])
@pytest.mark.parametrize("text", ["the other one<|endoftext|> and the last " * 5, "abcd", "abcde", ""])
def test_datasets_windows_are_upstreams(max_length, stride, text):
    expected = ch02.GPTDatasetV1(text, byte_encoding(), max_length, stride)
    got = book.GPTDatasetV1(text, byte_encoding(), max_length, stride)
    assert len(got) == len(expected)
    for (x, y), (their_x, their_y) in zip(map(got.__getitem__, range(len(got))), expected, strict=False):
        assert torch.equal(x, their_x)
        assert torch.equal(y, their_y)


@pytest.mark.parametrize("name", ["max_length", "stride"])
def test_bad_window_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        book.GPTDatasetV1("abc", Letters(), **{"max_length": 2, "stride": 2, name: 0})


def test_dataloader_is_upstreams(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: {"gpt2": byte_encoding()}[name])
    text = "In the beginning there was<|endoftext|>the word. " * 8
    for options in ({}, {"shuffle": False, "drop_last": False, "batch_size": 3}):
        torch.manual_seed(6)
        expected = list(ch02.create_dataloader_v1(text, max_length=8, stride=5, **options))
        torch.manual_seed(6)
        got = list(book.create_dataloader_v1(text, max_length=8, stride=5, **options))
        assert len(got) == len(expected) > 3
        for batch, theirs in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, theirs, strict=True))


def test_plot_losses_draws_upstreams_lines(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    arguments = ([0.0, 0.5, 1.0], [10, 20, 30], [3.0, 2.0, 1.0], [3.5, 3.0, 2.9])
    ch05.plot_losses(*arguments)
    (tmp_path / "loss-plot.pdf").unlink()
    book.plot_losses(*arguments)
    assert (tmp_path / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    drawn = [
        [
            (axes.get_xlabel(), axes.get_ylabel(), [line.get_xydata().tolist() for line in axes.lines])
            for axes in figure.axes
        ]
        for figure in figures
    ]
    assert drawn[0] == drawn[1]
    plt.close("all")


# Copies and wrappers


def test_copies_pickles_and_saved_models_have_no_cache(tmp_path):
    upstream, model = twins()
    with torch.no_grad():
        model(ids(2, 4), use_cache=True)
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
    for other in copies:
        same_logits(other, upstream)
        assert other.cfg == TINY
        with torch.no_grad():
            torch.testing.assert_close(other(ids(3, 4), use_cache=True), upstream(ids(3, 4)), rtol=0, atol=ATOL)
    copies[0].tok_emb.weight.data.zero_()
    same_logits(model, upstream)


def test_data_parallel():
    upstream, model = twins()
    wrapped = nn.DataParallel(model)
    same_logits(wrapped, upstream)
    assert wrapped.module.pos_emb.weight.shape[0] == T
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 20, T)
    assert torch.equal(book.generate_text_simple(wrapped, ids(2, 5), 20, T), expected)
    fresh = GPTModel(TINY).eval()
    fresh.load_state_dict(wrapped.state_dict())
    same_logits(fresh, upstream)


def test_distributed_data_parallel(tmp_path, capsys):
    upstream, model = twins()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        same_logits(wrapped, upstream)
        train, val = loaders()
        results = []
        for module, gpt in ((ch05, upstream), (book, wrapped)):
            optimizer = torch.optim.SGD(gpt.parameters(), lr=1e-2)
            for inputs, targets in train:
                optimizer.zero_grad()
                module.calc_loss_batch(inputs, targets, gpt, "cpu").backward()
                optimizer.step()
            results.append(module.evaluate_model(gpt, train, val, "cpu", 3))
        assert results[1] == pytest.approx(results[0], rel=1e-4)
        book.generate_and_print_sample(wrapped, Letters(), "cpu", "Hello")
        assert len(capsys.readouterr().out.strip()) == 55
        assert wrapped.module.pos_emb.weight.shape[0] == T
        fresh = GPTModel(TINY).eval()
        fresh.load_state_dict(wrapped.state_dict())
        same_logits(fresh, upstream.eval())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    upstream, model = twins()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    same_logits(compiled, upstream)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    fresh = GPTModel(TINY).eval()
    fresh.load_state_dict(compiled.state_dict())
    same_logits(fresh, upstream)
    upstream.load_state_dict(compiled._orig_mod.state_dict(masks=True))
    loss = book.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), compiled, "cpu")
    torch.testing.assert_close(loss, ch05.calc_loss_batch(ids(2, 9), ids(2, 9, seed=2), upstream, "cpu"))
    loss.backward()
    assert model.tok_emb.weight.grad.abs().sum() > 0
    expected = ch04.generate_text_simple(upstream, ids(2, 5), 20, T)
    assert torch.equal(book.generate_text_simple_cached(compiled, ids(2, 5), 20), expected)
    torch._dynamo.reset()


def test_from_pretrained_and_save_pretrained_keep_the_class(tmp_path):
    upstream, model = twins(drop_rate=0.1)
    model.save_pretrained(tmp_path)
    loaded = GPTModel.from_pretrained(tmp_path)
    assert type(loaded) is GPTModel
    assert loaded.cfg == {**TINY, "drop_rate": 0.1}
    same_logits(loaded, upstream)


def test_import_needs_nothing_but_torch_and_is_quick():
    code = """
import sys
for name in ("triton", "transformers", "tiktoken", "tensorflow", "matplotlib", "llms_from_scratch", "tqdm", "pandas"):
    sys.modules[name] = None
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
import torch, time
start = time.process_time()
from fastgpt.compat.llms_from_scratch import GPTModel, generate, calc_loss_batch
took = time.process_time() - start
assert not torch.cuda.is_initialized()
cfg = dict(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False)
model = GPTModel(cfg)
idx = torch.tensor([[1, 2, 3]])
calc_loss_batch(idx, idx, model, "cpu").backward()
assert generate(model.eval(), idx, 9, 8, temperature=1.0, top_k=3).shape == (1, 12)
print(took)
"""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert float(done.stdout) < 2.0

"""The book's GPTModel: construction and numbers, beside the package llms_from_scratch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from book_models import ATOL, T, V, ch04, ch05, ids, same_logits, twins
from models import TINY

from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import GPTModel, KVCache


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

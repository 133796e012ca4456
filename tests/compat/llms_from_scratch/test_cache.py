"""The book's caches: its own, ours and upstream's."""

from __future__ import annotations

import pytest
import torch
from book_models import ATOL, T, caches, ch04, ids, kv_cache, same_logits, twins

import fastgpt
from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import KVCache

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

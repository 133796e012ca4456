"""The book's generation: upstream's tokens, inside and past the context."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from book_models import Letters, T, V, ch04, ch05, ids, margins, twins
from models import TINY

import fastgpt
from fastgpt.compat import llms_from_scratch as book
from fastgpt.compat.llms_from_scratch import GPTModel


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
    monkeypatch.setattr("fastgpt.inference.batch.PREFILL_CHUNK", 4)
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

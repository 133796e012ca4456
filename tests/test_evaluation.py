"""Bits per byte against sums of log-probabilities from transformers' GPT-2, window by window, and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import tiny_config, tiny_model
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel, evaluation
from fastgpt.evaluation import evaluate
from fastgpt.text.tokenizer import BytePairTokenizer, SymbolTokenizer, Tokenizer

DOCUMENTS = ["naïve words, ", "and then some more of them 🙂🙂\n" * 2, "", "the end"]
PLAIN = BytePairTokenizer.from_ranks({bytes([b]): b for b in range(256)} | {b"the": 256, b" so": 257})
CHARS = SymbolTokenizer.from_text("char", "".join(DOCUMENTS))


def model_for(tokenizer: Tokenizer, **changes) -> GPTModel:
    return tiny_model(vocab_size=tokenizer.n_vocab, drop_rate=0.1, **changes)


def by_hand(model: GPTModel, ids: list[int], stride: int, directory) -> float:
    """The sum of -log p of ids[1:], each from the window that first reaches it: transformers' model, one token at a time."""
    model.save_pretrained(directory)
    reference = GPT2LMHeadModel.from_pretrained(directory).double().eval()
    context, nats = model.config.context_length, 0.0
    for position in range(1, len(ids)):
        windows = max(math.ceil((position - context) / stride), 0)
        end = min(context + windows * stride, len(ids) - 1)
        seen = ids[max(end - context, 0) : position]
        with torch.no_grad():
            logits = reference(torch.tensor([seen])).logits[0, -1]
        nats -= math.log(math.exp(logits[ids[position]]) / sum(math.exp(logit) for logit in logits))
    return nats


@pytest.mark.parametrize(("stride", "batch"), [(1, 8), (5, 3), (16, 1), (None, 8)])
def test_the_cost_is_the_sum_over_windows(stride, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "WINDOWS_PER_BATCH", batch)
    model, rows = model_for(PLAIN), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    result = evaluate(model, PLAIN, DOCUMENTS, stride)
    assert max(rows) == min(sum(rows), batch)
    end = 258
    ids = [end]
    for document in DOCUMENTS:
        ids += [*PLAIN.encode(document), end]
    nats = by_hand(model, ids, stride or 8, tmp_path)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=2e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=2e-4)
    assert (result.bytes, result.tokens) == (size, len(ids) - 1)
    assert result.bytes_per_token == pytest.approx(size / sum(len(PLAIN.encode(document)) for document in DOCUMENTS))


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 24, 25, 33])
def test_every_length_around_the_windows(length, tmp_path):
    text = ("".join(DOCUMENTS) * 2)[:length]
    model = model_for(CHARS)
    result = evaluate(model, CHARS, [text], stride=8)
    nats = by_hand(model, CHARS.encode(text), 8, tmp_path)
    assert result.tokens == length - 1
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=2e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
    model = model_for(PLAIN)
    torch.nn.init.zeros_(model.out_head.weight)
    result = evaluate(model, PLAIN, ["the naïve"])
    assert len(PLAIN.encode("the naïve")) == 8
    assert result.tokens == 9
    assert result.bytes == 10
    assert result.perplexity == pytest.approx(259, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(9 * math.log2(259) / 10, rel=1e-6)


def test_a_head_of_fixed_odds_costs_their_entropy():
    symbols = SymbolTokenizer("char", ["a", "b", "c"])
    model = tiny_model(vocab_size=3, head_bias=True)
    torch.nn.init.zeros_(model.out_head.weight)
    with torch.no_grad():
        model.out_head.bias.copy_(torch.tensor([0.5, 0.25, 0.25]).log())
    result = evaluate(model, symbols, ["caab" * 10, "a"])
    assert result.bits_per_byte == pytest.approx((21 * 1 + 19 * 2) / 41, rel=1e-6)
    assert (result.bytes, result.tokens) == (41, 40)


def test_a_smaller_stride_sees_at_least_as_much():
    model = model_for(PLAIN)
    results = {stride: evaluate(model, PLAIN, DOCUMENTS, stride).bits_per_byte for stride in (1, 8, 16, None)}
    assert results[8] == results[None]
    assert len(set(results.values())) == 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_is_off(training):
    model = model_for(PLAIN).train(training)
    first, second = (evaluate(model, PLAIN, DOCUMENTS) for _ in range(2))
    assert first == second
    assert model.training is training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_mode_is_restored_after_an_error(monkeypatch):
    model = model_for(PLAIN).train()
    handle = model.final_norm.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, PLAIN, DOCUMENTS)
    handle.remove()
    assert model.training
    assert math.isfinite(evaluate(model, PLAIN, DOCUMENTS).bits_per_byte)


def test_padded_rows_are_no_choices():
    model = model_for(PLAIN, vocab_multiple=64, tie_weights=False)
    expected = evaluate(model, PLAIN, DOCUMENTS)
    with torch.no_grad():
        model.out_head.weight[259:] = 100.0
    assert evaluate(model, PLAIN, DOCUMENTS) == expected


def test_a_hopeless_model_has_infinite_perplexity_and_a_broken_one_nan():
    model = model_for(PLAIN)
    with torch.no_grad():
        model.out_head.weight.mul_(1e6)
    result = evaluate(model, PLAIN, DOCUMENTS)
    assert result.perplexity == math.inf
    assert 1e5 < result.bits_per_byte < math.inf
    with torch.no_grad():
        model.out_head.weight.fill_(math.nan)
    result = evaluate(model, PLAIN, DOCUMENTS)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.bits_per_byte)


def test_half_precision_is_close_and_summed_wide():
    model = model_for(PLAIN)
    expected = evaluate(model, PLAIN, DOCUMENTS).bits_per_byte
    result = evaluate(model.bfloat16(), PLAIN, DOCUMENTS).bits_per_byte
    assert result == pytest.approx(expected, rel=0.02)
    assert result != expected


@pytest.mark.parametrize(
    ("changes", "documents", "stride", "message"),
    [
        ({}, DOCUMENTS, 0, "stride must be from 1 to the context length 16, got 0"),
        ({}, DOCUMENTS, 17, "stride must be from 1 to the context length 16, got 17"),
        ({}, [], None, "no text to evaluate: 0 documents of 0 bytes"),
        ({}, ["", ""], None, "no text to evaluate: 2 documents of 0 bytes"),
        ({"vocab_size": 200}, DOCUMENTS, None, "ids up to 258, the model a vocabulary of 200"),
        ({"causal": False}, DOCUMENTS, None, "causal=False sees the tokens that it should predict"),
    ],
)
def test_bad_input_is_named(changes, documents, stride, message):
    model = tiny_model(**{"vocab_size": 259, **changes})
    with pytest.raises(ValueError, match=message):
        evaluate(model, PLAIN, documents, stride)


def test_one_symbol_is_too_little():
    with pytest.raises(ValueError, match="at least two tokens to evaluate, got 1"):
        evaluate(model_for(CHARS), CHARS, ["n"])


def test_a_context_of_one_is_a_bigram_model():
    model = GPTModel(tiny_config(vocab_size=CHARS.n_vocab, context_length=1)).eval()
    result = evaluate(model, CHARS, [DOCUMENTS[1]])
    ids = CHARS.encode(DOCUMENTS[1])
    with torch.no_grad():
        table = torch.cat([model(torch.tensor([[i]]))[0] for i in range(CHARS.n_vocab)]).double().log_softmax(-1)
    nats = -sum(table[a, b].item() for a, b in itertools.pairwise(ids))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(DOCUMENTS[1].encode()), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)

"""The book's parts by name: the same parameters from the same seed, the same outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from llms_from_scratch import ch03, ch04

import fastgpt.compat.llms_from_scratch as ours

CFG = {
    "vocab_size": 50,
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
ATTENTION = {"d_in": 24, "d_out": 32, "context_length": 16, "dropout": 0.0, "num_heads": 4, "qkv_bias": True}


@pytest.mark.parametrize(
    ("name", "home", "arguments", "width"),
    [
        ("LayerNorm", ch04, (32,), 32),
        ("GELU", ch04, (), 32),
        ("FeedForward", ch04, (CFG,), 32),
        ("TransformerBlock", ch04, (CFG,), 32),
        ("MultiHeadAttention", ch03, tuple(ATTENTION.values()), 24),
    ],
)
def test_parts_are_the_books(name, home, arguments, width):
    made = []
    for module in (getattr(home, name), getattr(ours, name)):
        torch.manual_seed(3)
        made.append(module(*arguments))
    theirs, mine = made
    parameters = dict(mine.named_parameters())
    for key, value in theirs.named_parameters():
        assert torch.equal(value, parameters.pop(key)), key
    assert not parameters
    mine.load_state_dict(theirs.state_dict())  # with the causal mask that upstream keeps as a buffer
    results = []
    for module in made:
        x = torch.randn(2, 16, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, *(p.grad for p in module.parameters())))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_heads_that_do_not_divide_are_refused_as_in_the_book():
    with pytest.raises(AssertionError, match="d_out must be divisible by num_heads, got 10 and 4"):
        ours.MultiHeadAttention(8, 10, 16, 0.0, 4)


def test_a_cached_model_says_where_it_is():
    model = ours.GPTModel(CFG).eval()
    assert model.current_pos == 0
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), use_cache=True)
        model(torch.tensor([[4]]), use_cache=True)
    assert model.current_pos == 4
    model.reset_kv_cache()
    assert model.current_pos == 0

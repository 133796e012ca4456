"""The definition of correct, held to formulas written out here in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgpt import reference


def exact_softmax(scores: Tensor) -> Tensor:
    shifted = (scores - scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = shifted.sum(-1, keepdim=True)
    return torch.where(total > 0, shifted / total, 0.0)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    T, S = q.shape[-2], k.shape[-2]
    out = torch.zeros_like(q)
    for t in range(T):
        seen = max(S - T + t + 1, 0) if causal else S
        if seen:
            weights = exact_softmax(scale * (q[..., t : t + 1, :] @ k[..., :seen, :].mT))
            out[..., t, :] = (weights @ v[..., :seen, :])[..., 0, :]
    return out


def test_embedding_is_the_sum_of_two_rows():
    idx, tokens, positions = torch.randint(9, (2, 5)), torch.randn(9, 4), torch.randn(8, 4)
    expected = torch.stack([torch.stack([tokens[i] + positions[3 + t] for t, i in enumerate(row)]) for row in idx])
    assert torch.equal(reference.embedding(idx, tokens, positions, offset=3), expected)


def test_layer_norm_is_the_formula():
    x, w, b = torch.randn(5, 7).double(), torch.randn(7).double(), torch.randn(7).double()
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b
    torch.testing.assert_close(reference.layer_norm(x, w, b), expected)
    torch.testing.assert_close(reference.layer_norm(x, w, None), expected - b)
    mixed = reference.layer_norm(x.to(torch.bfloat16), w.float(), b.float())
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), expected, rtol=2e-2, atol=3e-2)


def test_add_layer_norm_returns_norm_and_total():
    x, residual, w, b = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), torch.randn(8)
    y, total = reference.add_layer_norm(x, residual, w, b)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, reference.layer_norm(x + residual, w, b))


def test_seeded_dropout_repeats_and_keeps_its_share():
    x = torch.ones(200, 200)
    zeros = torch.zeros_like(x)
    _, once = reference.add_layer_norm(x, zeros, torch.ones(200), None, dropout_p=0.3, seed=5)
    _, again = reference.add_layer_norm(x, zeros, torch.ones(200), None, dropout_p=0.3, seed=5)
    _, other = reference.add_layer_norm(x, zeros, torch.ones(200), None, dropout_p=0.3, seed=6)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert (once == 0).float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 40_000))
    torch.testing.assert_close(once[once != 0], torch.full_like(once[once != 0], 1 / 0.7))
    _, none = reference.add_layer_norm(x, zeros, torch.ones(200), None, dropout_p=1.0, seed=5)
    assert torch.equal(none, zeros)


@pytest.mark.parametrize("causal", [False, True])
def test_softmax_is_the_formula(causal):
    x = torch.randn(2, 5, 5).double()
    scores = 0.7 * x
    if causal:
        scores = scores.masked_fill(torch.triu(torch.ones(5, 5), 1).bool(), -math.inf)
    torch.testing.assert_close(reference.softmax(x, 0.7, causal), exact_softmax(scores))


def test_masked_rows_are_zero():
    x = torch.full((2, 4), -math.inf)
    x[1, 2] = 1.0
    assert reference.softmax(x).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    x[1, 0] = math.nan
    y = reference.softmax(x, 0.5)
    assert y[0].tolist() == [0, 0, 0, 0]
    assert y[1].isnan().all()
    assert reference.softmax(x[:, :0]).shape == (2, 0)
    compiled = torch.compile(reference.softmax, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), reference.softmax(x), rtol=0, atol=0, equal_nan=True)
    # three queries at the end of two keys: the first sees none
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    assert torch.equal(reference.attention(q, k, v)[0, 0, 0], torch.zeros(4))


def test_gelu_and_its_forms():
    x = torch.linspace(-6, 6, 101).double()
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    erf = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(reference.gelu(x), tanh)
    torch.testing.assert_close(reference.gelu(x, "none"), erf)
    assert (tanh - erf).abs().max() > 1e-4
    torch.testing.assert_close(reference.bias_gelu(x - 1, torch.ones(101).double()), tanh)


def test_linear_and_mlp():
    x, w1, b1 = torch.randn(3, 4, 5).double(), torch.randn(6, 5).double(), torch.randn(6).double()
    w2, b2 = torch.randn(5, 6).double(), torch.randn(5).double()
    inner = torch.einsum("btk,nk->btn", x, w1) + b1
    torch.testing.assert_close(reference.linear(x, w1, b1), inner)
    torch.testing.assert_close(reference.linear(x, w1, b1, "relu"), inner.clamp(min=0))
    torch.testing.assert_close(
        reference.mlp(x, w1, b1, w2, b2, "relu"), torch.einsum("btk,nk->btn", inner.clamp(min=0), w2) + b2
    )
    with pytest.raises(ValueError, match=r"activation must be None or one of .*, got 'swish'"):
        reference.linear(x, w1, b1, "swish")


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 6), (5, 5), (3, 7), (6, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_formula(T, S, causal):
    q, k, v = torch.randn(2, 3, T, 8).double(), torch.randn(2, 3, S, 8).double(), torch.randn(2, 3, S, 8).double()
    torch.testing.assert_close(reference.attention(q, k, v, causal), exact_attention(q, k, v, causal, 8**-0.5))
    torch.testing.assert_close(reference.attention(q, k, v, causal, 0.3), exact_attention(q, k, v, causal, 0.3))


@pytest.mark.parametrize(("T", "S"), [(7, 7), (3, 7), (7, 3)])
def test_attention_from_a_first_key_is_the_formula(T, S):
    q, k, v = torch.randn(2, 2, T, 4).double(), torch.randn(2, 2, S, 4).double(), torch.randn(2, 2, S, 4).double()
    first = torch.tensor([[0, 0, 1, 1, 4, 4, 9][-T:], [2] * T], dtype=torch.int32)
    right = torch.zeros(2, 2, T, 4).double()
    for b, t in itertools.product(range(2), range(T)):
        begin, end = int(first[b, t]), S - T + t + 1
        if begin < end:
            keys = slice(begin, end)
            right[b, :, t] = exact_attention(q[b, :, t : t + 1], k[b, :, keys], v[b, :, keys], False, 0.5)[:, 0]
    torch.testing.assert_close(reference.attention(q, k, v, first=first), right)
    dropped = reference.attention(q, k, v, first=first, dropout_p=1e-9, seed=1)
    torch.testing.assert_close(dropped, right)


def test_attention_dropout_acts_on_probabilities():
    q, k, v = torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64), torch.eye(64)[None, None]
    out = reference.attention(q, k, v, causal=False, dropout_p=0.25, seed=3)[0, 0]
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / 64 / 0.75))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4096))


@pytest.mark.parametrize("T", [1, 3])
def test_decode_attention_reads_each_rows_own_length(T):
    lengths = [3, 7, 5]
    q, k, v = torch.randn(3, 2, T, 4).double(), torch.randn(3, 2, 9, 4).double(), torch.randn(3, 2, 9, 4).double()
    for row, length in enumerate(lengths):
        k[row, :, length:] = math.nan
        v[row, :, length:] = math.nan
    out = reference.decode_attention(q, k, v, torch.tensor(lengths, dtype=torch.int32))
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        torch.testing.assert_close(out[one], exact_attention(q[one], k[one, :, :length], v[one, :, :length], True, 0.5))


def test_decode_attention_of_an_empty_row_is_zero():
    q, kv = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 3, 4)
    assert torch.equal(
        reference.decode_attention(q, kv, kv, torch.zeros(1, dtype=torch.int32)), torch.zeros(1, 1, 1, 4)
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_minus_log_softmax(reduction):
    x, w, b = torch.randn(6, 4).double(), torch.randn(9, 4).double(), torch.randn(9).double()
    targets = torch.tensor([3, 8, -100, 0, 2, -100])
    logits = x @ w.T + b
    rows = -exact_softmax(logits).log()[torch.arange(6), targets.clamp(min=0)]
    rows[targets == -100] = 0
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 4}[reduction]
    torch.testing.assert_close(reference.cross_entropy(logits, targets, reduction=reduction), expected)
    torch.testing.assert_close(reference.linear_cross_entropy(x, w, targets, b, reduction=reduction), expected)


def test_cross_entropy_of_16_bit_logits_is_fp32():
    logits = torch.randn(4, 9).to(torch.bfloat16)
    loss = reference.cross_entropy(logits, torch.tensor([1, 2, 3, 4]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -logits.float().log_softmax(-1)[torch.arange(4), [1, 2, 3, 4]].mean())
    assert reference.cross_entropy(logits, torch.full((4,), -100)).isnan()

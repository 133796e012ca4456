"""Every op in plain PyTorch: the definition of correct, and the path that runs where Triton can't.

The kernels package has the same names and signatures (a test compares them). Notation: B batch, H heads, T queries, S keys,
D head size, C model width, V vocabulary, N rows. All ops are differentiable by autograd, take any strides and any floating
dtype, and compute softmax and cross-entropy statistics in at least fp32.

Dropout keeps each element with probability 1 - dropout_p and scales what it keeps by 1 / (1 - dropout_p). `seed=None` draws
from torch's global generator exactly as `torch.nn.functional.dropout` does; an integer seed makes the call a pure function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")

# Rows of int8 weights that are widened at a time: at 768 columns 12 MB in fp32, which a product finds in the caches again.
WIDENED_ROWS = 4096


def embedding(
    idx: Tensor,
    tok_weight: Tensor,
    pos_weight: Tensor,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    """dropout(tok_weight[idx] + pos_weight[positions]). idx [B, T], tok_weight [V, C], pos_weight [P, C] -> [B, T, C].

    positions: int32 or int64 [B, T]; None is offset .. offset + T - 1 in every row.
    """
    if positions is None:
        place = pos_weight[offset : offset + idx.shape[1]]
    elif offset == 0:
        place = F.embedding(positions, pos_weight)
    else:
        raise ValueError(f"embedding: positions are given, so offset must be 0, got {offset}")
    return _dropout(F.embedding(idx, tok_weight) + place, dropout_p, seed)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; var is biased. x [..., C] -> x's shape, in `dtype`
    or else x's."""
    dtype = dtype or x.dtype
    if weight.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
    wide = torch.promote_types(x.dtype, weight.dtype)
    y = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps)
    return y.to(dtype)


def add_layer_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """total = residual + dropout(x); returns (layer_norm(total), total) [..., C]: total in the residual's dtype, the norm in
    `dtype` or else that too. Where x is None total is the residual itself.
    """
    total = residual if x is None else dropout_add(x, residual, dropout_p, seed)
    return layer_norm(total, weight, bias, eps, dtype), total


def dropout_add(x: Tensor, residual: Tensor, dropout_p: float = 0.0, seed: int | None = None) -> Tensor:
    """residual + dropout(x), both [..., C], in the residual's dtype."""
    return residual + _dropout(x, dropout_p, seed).to(residual.dtype)


def softmax(x: Tensor, scale: float = 1.0, causal: bool = False) -> Tensor:
    """softmax(scale * x) over the last dimension. With `causal`, x is [..., T, S] and query t sees keys 0 .. S - T + t.

    A fully masked row gives zeros, as torch's scaled_dot_product_attention has it. Statistics are fp32 for 16-bit input.
    """
    scores = x.to(_at_least_float32(x.dtype))
    if scale != 1.0:
        scores = scores * scale
    if causal:
        scores = scores.masked_fill(~causal_mask(x.shape[-2], x.shape[-1], x.device), -math.inf)
    return _safe_softmax(scores).to(x.dtype)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU; "tanh" is GPT-2's approximation, "none" the exact erf form."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias), x [..., C], bias [C]."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """activation(x @ weight.T + bias). x [..., K], weight [N, K], bias [N] -> [..., N]. `activation` in ACTIVATIONS or None."""
    return activate(F.linear(x, weight, bias), activation)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """x @ (scale[:, None] * weight).T + bias. x [..., K], weight int8 [N, K], scale fp32 [N], bias [N] -> [..., N] in x's dtype.

    The integers are exact in every dtype but float16, whose sums could overflow before they are scaled: it is computed in fp32.
    Autocast, which may be to float16, is off inside.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return int8_linear(x, weight, scale, bias, product)
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    parts = [product(rows, part.to(dtype)) for part in weight.split(WIDENED_ROWS)]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    y = sums * scale if bias is None else torch.addcmul(bias, sums, scale)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


def int4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """x @ int4_weights(weight, scale).T + bias. x [..., K], weight uint8 [N, K / 2], scale [N, K / group, 2], bias [N]."""
    parts = zip(weight.split(WIDENED_ROWS), scale.split(WIDENED_ROWS), strict=True)
    y = torch.cat([product(x, int4_weights(*part, x.dtype)) for part in parts], dim=-1)
    return y if bias is None else y + bias


def int4_weights(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What weights of four bits stand for, [N, K]: (q - 8) * scale[..., 0] + scale[..., 1], q from 0 to 15, by groups of columns.

    weight uint8 [N, K / 2] holds q of an even column in its low bits and of the odd one after it in its high bits.
    """
    wide = _at_least_float32(dtype)
    step, middle = scale.to(wide).unbind(-1)
    q = torch.stack((weight & 15, weight >> 4), dim=-1).view(*step.shape, -1).to(wide) - 8.0
    return torch.addcmul(middle[..., None], q, step[..., None]).flatten(1).to(dtype)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """residual + linear(linear(x, w1, b1, activation), w2, b2): the two layers of a transformer's feed-forward part."""
    y = F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)
    return y if residual is None else residual + y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T) @ v. q [B, H, T, D], k and v [B, H, S, D] -> [B, H, T, D]; scale defaults to D ** -0.5.

    `causal` is aligned to the end: query t sees keys 0 .. S - T + t, so that the queries may be the last T of S positions. With
    `first`, int32 [B, T], query t of row b sees keys first[b, t] .. S - T + t: where its document begins in a packed row, the
    length of the padding on the row's left, or S - T + t - w + 1 for a window of w keys. It must not decrease along T, which is
    checked where that doesn't make a device wait. A query that sees no key gives zeros and no gradient. Dropout acts on the
    probabilities.
    """
    T, S = q.shape[-2], k.shape[-2]
    if first is not None:
        return _attention_from(first, q, k, v, causal, scale, dropout_p, seed)
    if dropout_p > 0.0:
        return _dropout(attention_probabilities(q, k, causal, scale), dropout_p, seed) @ v
    if not causal or T == 1 <= S:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if T < S:
        mask = causal_mask(T, S, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return attention_probabilities(q, k, causal, scale) @ v


def packed_attention(
    qkv: Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """`attention` of what one projection made: qkv [B, T, 3, H, D] -> [B, H, T, D]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return attention(q, k, v, causal, scale, dropout_p, seed, first)


def _attention_from(
    first: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    seed: int | None,
) -> Tensor:
    """`attention` with the first key that each query sees."""
    (B, _, T, D), S = q.shape, k.shape[-2]
    if first.dtype != torch.int32 or first.shape != (B, T):
        raise ValueError(f"attention: first must be int32 of shape {(B, T)}, got {first.dtype} {tuple(first.shape)}")
    if not causal:
        raise ValueError("attention: first goes with causal=True alone, got causal=False")
    if first.device.type == "cpu" and not torch.compiler.is_compiling():
        down = (first[:, 1:] < first[:, :-1]).nonzero()
        if len(down):
            raise ValueError(f"attention: first must not decrease along T, but does behind [row, t] {down[0].tolist()}")
    keys = torch.arange(S, device=q.device)
    visible = (causal_mask(T, S, q.device) & (keys >= first[:, :, None]))[:, None]  # [B, 1, T, S]
    if dropout_p > 0.0:
        scores = (q @ k.transpose(-2, -1)).to(_at_least_float32(q.dtype)) * (D**-0.5 if scale is None else scale)
        weights = _safe_softmax(scores.masked_fill(~visible, -math.inf)).to(q.dtype)
        return _dropout(weights, dropout_p, seed) @ v
    blind = ~visible.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


def attention_probabilities(q: Tensor, k: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """The [B, H, T, S] matrix that `attention` never shows: who attends to whom, before dropout."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return softmax(q @ k.transpose(-2, -1), scale=scale, causal=causal)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, first: Tensor | None = None
) -> Tensor:
    """A few new queries against a cache. q [B, H, T, D], caches [B, H, S, D], lengths and first int32 [B] -> [B, H, T, D].

    Row b's cache holds lengths[b] positions, the last T of which are the queries' own; query t sees keys
    first[b] .. lengths[b] - T + t, from 0 where `first` is None: what pads a row on its left lies before it. What lies behind
    lengths[b] is never read into the result, NaN included; what lies before `first` counts for nothing, but a NaN there may
    show. A query that sees no key gives zeros.
    """
    T, S = q.shape[-2], k_cache.shape[-2]
    keys = torch.arange(S, device=q.device)
    last_key = lengths.to(torch.int64)[:, None] - T + torch.arange(T, device=q.device)
    visible = keys <= last_key[:, :, None]  # [B, T, S]
    if first is not None:
        visible = visible & (keys >= first[:, None, None])
    if T == 1 and visible.device.type == "cpu" and bool(visible.all()):  # a look that would make a GPU wait
        return F.scaled_dot_product_attention(q, k_cache, v_cache)
    unused = (keys >= lengths[:, None])[:, None, :, None]
    k, v = k_cache.masked_fill(unused, 0.0), v_cache.masked_fill(unused, 0.0)
    scores = (q @ k.transpose(-2, -1)).to(_at_least_float32(q.dtype)) * q.shape[-1] ** -0.5
    return _safe_softmax(scores.masked_fill(~visible[:, None], -math.inf)).to(q.dtype) @ v


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits [N, V] with targets int64 [N]. "mean" divides by the targets that aren't `ignore_index`.

    label_smoothing e makes the target's probability 1 - e + e / V and every other's e / V. z_loss adds so much of each row's
    logsumexp squared, which keeps it near 0 (https://arxiv.org/abs/2204.02311, section 5). The result is fp32 (float64 for
    float64 logits). As in torch, the mean over no targets is NaN.
    """
    logits = logits.to(_at_least_float32(logits.dtype))
    rows = "none" if z_loss else reduction
    loss = F.cross_entropy(logits, targets, None, None, ignore_index, None, rows, label_smoothing)
    if not z_loss:
        return loss
    used = targets != ignore_index
    loss = loss + (z_loss * logits.logsumexp(-1).square()).masked_fill(~used, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / used.sum() if reduction == "mean" else loss.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy(x @ weight.T + bias, targets, ...). x [N, C], weight [V, C], bias [V], targets int64 [N]."""
    return cross_entropy(F.linear(x, weight, bias), targets, ignore_index, reduction, label_smoothing, z_loss)


def linear_cross_entropy_with_statistics(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(linear_cross_entropy(...), logsumexp [N] in fp32, whether no token was more likely than the target [N]).

    The latter two have no gradient; they are 0 and False where the target is `ignore_index`.
    """
    logits = F.linear(x, weight, bias)
    return cross_entropy_with_statistics(logits, targets, ignore_index, reduction, label_smoothing, z_loss)


def cross_entropy_with_statistics(logits: Tensor, targets: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What linear_cross_entropy_with_statistics gives for these logits; `how`, from ignore_index on, is cross_entropy's."""
    loss = cross_entropy(logits, targets, *how)
    ignore_index = how[0] if how else -100
    wide, used = logits.detach().to(_at_least_float32(logits.dtype)), targets != ignore_index
    chosen = wide.gather(1, targets.where(used, 0)[:, None])[:, 0]
    return loss, wide.logsumexp(-1).where(used, 0.0), used & (chosen == wide.amax(-1))


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Apply one of ACTIVATIONS, or nothing for None."""
    if activation is None:
        return x
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu":
        return F.relu(x)
    raise ValueError(f"activation must be None or one of {ACTIVATIONS}, got {activation!r}")


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Boolean [T, S], True where query t may see key s, aligned to the end."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def _safe_softmax(scores: Tensor) -> Tensor:
    weights = torch.softmax(scores, dim=-1)
    # A row without a key comes out as NaN from end to end. Where looking is free, one element a row says that there is none.
    if scores.device.type == "cpu" and not torch.compiler.is_compiling() and not weights[..., :1].isnan().any():
        return weights
    return weights.masked_fill(scores.isneginf().all(dim=-1, keepdim=True), 0.0)


def _dropout(x: Tensor, p: float, seed: int | None) -> Tensor:
    if p == 0.0:
        return x
    if seed is None:
        return F.dropout(x, p)
    if p == 1.0:
        return x * 0.0
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.rand(x.shape, device=x.device, generator=generator) >= p
    return x * keep.to(x.dtype) / (1.0 - p)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

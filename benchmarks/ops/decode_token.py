"""One new token through a few layers of GPT-2 and its head, as one op. Bound by memory: every weight and the cache, once.

The cache is full but for the token's own position, and the buffers that take turns hold weights of their own, so that these come
from memory as in a whole model. `torch` is fastgpt.reference, op after op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import Absent, Case, Work
from benchmarks.harness.op import Draw, Op, interpreting
from benchmarks.models import graphed
from fastgpt import reference

SIZES = {
    "gpu": [
        {"L": 4, "B": 1, "C": 768, "H": 12, "S": 1024, "V": 50257},
        {"L": 4, "B": 8, "C": 768, "H": 12, "S": 1024, "V": 50257},
        {"L": 4, "B": 1, "C": 1600, "H": 25, "S": 1024, "V": 50257},
    ],
    "cpu": [],  # the kernels are a GPU's
    "dry": [{"L": 1, "B": 1, "C": 8, "H": 1, "S": 8, "V": 16}],
}
BLOCK = 12  # tensors of a block: norm, QKV, projection, norm, up and down, each with its bias


def work(s, b):
    weights = s["L"] * (12 * s["C"] ** 2 + 13 * s["C"]) + s["V"] * s["C"] + 2 * s["C"]
    cache = 2 * s["L"] * s["B"] * s["S"] * s["C"]
    flops = 2.0 * s["B"] * (12 * s["L"] * s["C"] ** 2 + s["V"] * s["C"]) + 2.0 * cache
    written = s["B"] * (4 * s["V"] + 2 * s["L"] * s["C"] * b)
    return Work(flops, (weights + cache) * b, written)


def inputs(size, draw: Draw) -> tuple[Tensor, ...]:
    L, B, C, H, S, V = (size[name] for name in "LBCHSV")
    norm = lambda: (1.0 + draw.normal(C, std=0.1), draw.normal(C, std=0.1))  # noqa: E731
    matrix = lambda n, k: (draw.normal(n, k, std=k**-0.5), draw.normal(n, std=0.1))  # noqa: E731
    tokens = draw.ids(V, B)
    positions = torch.full((B,), S - 1, dtype=torch.int32, device=tokens.device)
    keys, values = (draw.normal(L, B, H, S, C // H) for _ in range(2))
    blocks = [
        (*norm(), *matrix(3 * C, C), *matrix(C, C), *norm(), *matrix(4 * C, C), *matrix(C, 4 * C)) for _ in range(L)
    ]
    tables = draw.normal(V, C, std=C**-0.5), draw.normal(S, C, std=C**-0.5)
    return tokens, positions, keys, values, *tables, *norm(), *(tensor for block in blocks for tensor in block)


def blocks_of(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return (tensors[i : i + BLOCK] for i in range(0, len(tensors), BLOCK))


def plain(tokens, positions, keys, values, table, places, norm, shift, *blocks) -> Tensor:
    """Logits [B, V] by fastgpt.reference; keys and values join the cache."""
    (_, B, H, _, D), rows, at = keys.shape, torch.arange(len(tokens), device=tokens.device), positions.long()
    x = table[tokens] + places[at]
    for layer, block in enumerate(blocks_of(blocks)):
        norm1, shift1, qkv, qkv_bias, out, out_bias, norm2, shift2, *feed_forward = block
        y = reference.linear(reference.layer_norm(x, norm1, shift1), qkv, qkv_bias)
        q, k, v = y.view(B, 3, H, 1, D).unbind(1)
        keys[layer, rows, :, at], values[layer, rows, :, at] = k[:, :, 0], v[:, :, 0]
        y = reference.decode_attention(q, keys[layer], values[layer], positions + 1)
        x = x + reference.linear(y.reshape(B, H * D), out, out_bias)
        x = x + reference.mlp(reference.layer_norm(x, norm2, shift2), *feed_forward)
    return F.linear(reference.layer_norm(x, norm, shift), table)


def cublas(case: Case) -> Callable[..., Tensor]:
    """The step that the peer of whole generations captures: cuBLAS, SDPA, index_copy_."""

    def call(tokens, positions, keys, values, table, places, norm, shift, *blocks) -> Tensor:
        visible = (torch.arange(keys.shape[3], device=keys.device) <= positions[:1])[None, None, None]
        return graphed.logits(
            tokens[:, None], positions[:1].long(), visible, (table, places), list(blocks_of(blocks)), (norm, shift), table,
            keys, values, 1e-5,
        )  # fmt: skip

    return call


def fused(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What `launch(tokens, positions, weights, keys, values, buffers)` gives; it moves a copy of the positions on."""

    def call(tokens, positions, keys, values, table, places, norm, shift, *blocks) -> Tensor:
        from fastgpt_kernels.decode_token import LayerWeights, TokenWeights, token_buffers

        layers = []
        for block in blocks_of(blocks):
            norm1, shift1, qkv, qkv_bias, *rest = block
            parts = [pair for pairs in zip(qkv.chunk(3), qkv_bias.chunk(3), strict=True) for pair in pairs]
            layers.append(LayerWeights(norm1, shift1, *parts, *rest))
        weights = TokenWeights(table, places, tuple(layers), norm, shift, table, None)
        buffers = token_buffers(weights, len(tokens), keys.shape[2], keys.shape[3], table.shape[0])
        return launch(tokens, positions.clone(), weights, keys, values, buffers)

    return call


@fused
def kernels(*arguments: Any) -> Tensor:
    from fastgpt_kernels.decode_token import decode_token

    return decode_token(*arguments)


@fused
def dependent(*arguments: Any) -> Tensor:
    from fastgpt_kernels.decode_token import decode_token

    return decode_token(*arguments, pdl=True)


_plans: dict[tuple[int, int], Any] = {}  # made in a first call, which no graph captures


@fused
def ahead(tokens: Tensor, positions: Tensor, weights: Any, *rest: Any) -> Tensor:
    from fastgpt_kernels import decode_token

    key = weights.head.data_ptr(), decode_token.AHEAD_BYTES
    if key not in _plans:
        _plans[key] = decode_token.plan_ahead(weights)
    plan = _plans[key]
    return decode_token.decode_token(tokens, positions, weights, *rest, pdl=plan is not None, ahead=plan)


def dependent_peer(case: Case) -> Callable[..., Tensor]:
    if interpreting() or torch.cuda.get_device_capability() < (9, 0):
        raise Absent("dependent launch came with compute capability 9.0")
    return dependent


TOKEN = Op(
    "decode_token",
    inputs,
    {"forward": work},
    SIZES,
    peers={
        "fastgpt, dependent": dependent_peer,
        "cuBLAS and SDPA": cublas,
    },
    direct=kernels,
    plain=plain,
)
AHEAD = Op("decode_token", inputs, {"forward": work}, SIZES, direct=ahead, plain=plain)  # for the sweep
OPS = (TOKEN,)

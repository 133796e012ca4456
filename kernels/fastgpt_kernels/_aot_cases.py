"""What `fastgpt_kernels.aot` compiles, and what it holds each kernel to.

A case is one use of a public function at one of the GPT-2 family's sizes; a kernel that no entry of KINDS names fails the lane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import arch

# tf32: fp32 with torch.set_float32_matmul_precision("high"), for the ops with products
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "tf32": torch.float32,
}  # fmt: skip
WIDTHS = {768: 12, 1024: 16, 1280: 20, 1600: 25}  # GPT-2's four models and their heads
HEAD_SIZES = (64, 80, 96, 128)
OTHER_HEAD_SIZES = (16, 32, 48, 100, 112, 160, 192, 256)
VOCABULARY = 50257
ROWS = 8192  # 8 sequences of 1024 tokens


class Kind(NamedTuple):
    """What a kernel is held to.

    From a launch's arguments by name, flops: None where memory bounds it; programs: planned to be on a multiprocessor at once,
    where the grid has as many. weights: whether it reads something that no kernel before it wrote, and so, launched dependently,
    requests that before it waits for them. waves: of loads that may follow one on another's answer; None: as many as there are.
    spills: bytes of a thread's registers that may go through memory. wide: whether 16-bit data can come 16 bytes at a load.
    """

    flops: Callable[[Mapping[str, Any]], float] | None = None
    programs: Callable[[Mapping[str, Any]], int] = lambda arguments: 1
    weights: bool = True
    waves: Callable[[Mapping[str, Any]], int | None] = lambda arguments: None
    spills: Callable[[Mapping[str, Any]], int] = lambda arguments: 0
    wide: Callable[[Mapping[str, Any]], bool] = lambda arguments: True


def _product_flops(a: Mapping[str, Any]) -> float:
    return 2.0 * a["M"] * a["N"] * a["K"]


def _attention_flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    """Of `products` matrix products of [B, H, T, S] with D; causality saves half of each."""
    return lambda a: products * 2.0 * a["q_ptr"].numel() * a["S"] * (0.5 if a["CAUSAL"] else 1.0)


def _few_of_wide_heads(a: Mapping[str, Any]) -> int:
    """Heads over 128 wide, which no GPT-2 has, may spill a little."""
    return 64 if a["D"] > 128 else 0


def _streaming(width: str) -> Kind:
    """Of a kernel whose programs hold ROWS rows of W of that width, for one row after another of the batch."""

    def programs(a: Mapping[str, Any]) -> int:
        from .decode_token import resident

        if a.get("INPUT") == "parts" and a["B"] > 1:  # a row's parts, 24 KB of them, are most of what is in flight
            return 1 if a["WINDOW"] > 1 or a[width] > 1024 else 2
        return resident(a["ROWS"], a[width])

    return Kind(programs=programs, waves=lambda a: 2 if a["B"] == 1 else None)


def _split_waves(a: Mapping[str, Any]) -> int | None:
    """The length, then keys and values with q; ptxas asks for a second piece of q behind k's first in fp16 and of split heads."""
    if a["BLOCK_T"] > 1 or a["first_ptr"] is not None:
        return None
    return 3 if a["BLOCK_E"] or a["k_ptr"].dtype == torch.float16 else 2


STREAM = Kind()
KINDS: dict[str, Kind] = {
    "_layer_norm_fwd_kernel": STREAM,
    "_layer_norm_bwd_kernel": STREAM,
    "_column_sums_kernel": STREAM,
    "_dropout_add_kernel": STREAM,
    "_softmax_fwd_kernel": STREAM,
    "_softmax_bwd_kernel": STREAM,
    "_softmax_wide_fwd_kernel": STREAM,
    "_softmax_wide_bwd_kernel": STREAM,
    "_gelu_fwd_kernel": STREAM,
    "_gelu_bwd_kernel": STREAM,
    "_activation_backward_kernel": STREAM,
    # One that goes from tile to tile is launched as often as it is planned to fit.
    "_gemm_kernel": Kind(_product_flops, programs=lambda a: 8 if a["DESCRIPTORS"] else 1),
    "_attention_fwd_kernel": Kind(_attention_flops(2), spills=_few_of_wide_heads),
    "_attention_bwd_kernel": Kind(_attention_flops(5), spills=_few_of_wide_heads),
    "_attention_statistics_kernel": Kind(spills=_few_of_wide_heads, wide=lambda a: a["D"] % 8 == 0),
    # The cache, to which the kernel before may have just added; the keys wait for the length.
    "_decode_split_kernel": Kind(weights=False, waves=_split_waves, wide=lambda a: a["D"] % 8 == 0),
    "_decode_combine_kernel": STREAM,
    "_token_qkv_kernel": _streaming("C"),
    "_token_matrix_kernel": _streaming("K"),
    "_sample_sort_kernel": STREAM,
    "_sample_select_kernel": STREAM,
    "_sample_draw_kernel": STREAM,
    "_sample_pick_kernel": STREAM,
    "_embedding_fwd_kernel": STREAM,
    "_embedding_bwd_kernel": STREAM,
    "_cross_entropy_kernel": STREAM,
    "_scale_kernel": STREAM,
}


class Case(NamedTuple):
    """One use of a public function: `build` runs it, forward and backward, on meta tensors."""

    op: str
    label: str  # begins with the name of its dtype
    build: Callable[[], None]


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


@dataclasses.dataclass(frozen=True)
class Scope:
    """Which of the GPT-2 family's sizes and variants to go through.

    Unless `exhaustive`, what hardly changes the code is gone through at the first size alone: the dtypes in `first_size_only`
    and the variants (no bias, fp32 weights, other activations, a residual without dropout).
    """

    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    widths: tuple[int, ...] = tuple(WIDTHS)
    head_sizes: tuple[int, ...] = HEAD_SIZES
    variants: bool = True
    first_size_only: tuple[str, ...] = ("fp16", "tf32")  # they differ from bf16 and fp32 in conversions and precision
    exhaustive: bool = False
    documents: bool = True  # of attention

    def over(self, sizes: Sequence[int], products: bool = False) -> Iterator[tuple[str, torch.dtype, int, bool]]:
        """(name, dtype, size, whether to go through the variants)."""
        tf32 = ("tf32",) if products and "fp32" in self.dtypes else ()
        for name, size in itertools.product((*self.dtypes, *tf32), sizes):
            first = self.exhaustive or size == sizes[0]
            if first or name not in self.first_size_only:
                yield name, DTYPES[name], size, self.variants and first


QUICK = Scope(("bf16",), (768,), (64,), variants=False, documents=False)
HEADS = Scope(
    ("bf16", "fp16", "fp32", "fp64"), head_sizes=HEAD_SIZES + OTHER_HEAD_SIZES, variants=False, first_size_only=()
)
# for sm100 and sm120, to keep the lane within five minutes on two cores
NARROW = Scope(variants=False, first_size_only=("fp16", "tf32", "fp32"))


def layer_norm_cases(scope: Scope) -> Iterator[Case]:
    from .layer_norm import add_layer_norm, layer_norm

    def run(
        dtype: torch.dtype, weight_dtype: torch.dtype, width: int, rows: int, bias: bool, dropout_p: float | None
    ) -> None:
        weight = meta(width, dtype=weight_dtype, grad=True)
        shift = meta(width, dtype=weight_dtype, grad=True) if bias else None
        x, residual = (meta(rows, width, dtype=dtype, grad=True) for _ in range(2))
        if dropout_p is None:
            backward(layer_norm(x, weight, shift))
        else:
            backward(*add_layer_norm(x, residual, weight, shift, dropout_p=dropout_p))

    for name, dtype, width, variants in scope.over(scope.widths):
        for dropout_p, rows in itertools.product((None, 0.0, 0.1) if variants else (None, 0.1), (ROWS, 8)):
            op = "layer_norm" if dropout_p is None else "add_layer_norm"
            label = f"{name} C={width} M={rows}" + (f" dropout={dropout_p}" if dropout_p else "")
            yield Case(op, label, partial(run, dtype, dtype, width, rows, True, dropout_p))
            if variants and rows == ROWS:
                yield Case(op, f"{label} no bias", partial(run, dtype, dtype, width, rows, False, dropout_p))
                # as under autocast
                yield Case(op, f"{label} fp32 weight", partial(run, dtype, torch.float32, width, rows, True, dropout_p))


def embedding_cases(scope: Scope) -> Iterator[Case]:
    from .embedding import embedding

    def run(dtype: torch.dtype, width: int, dropout_p: float) -> None:
        tokens, positions = (meta(n, width, dtype=dtype, grad=True) for n in (VOCABULARY, 1024))
        backward(embedding(meta(8, 1024, dtype=torch.int64), tokens, positions, dropout_p=dropout_p))

    for name, dtype, width, _ in scope.over(scope.widths):
        for dropout_p in (0.0, 0.1):
            yield Case("embedding", f"{name} C={width} dropout={dropout_p}", partial(run, dtype, width, dropout_p))


def dropout_add_cases(scope: Scope) -> Iterator[Case]:
    from .dropout import dropout_add

    def run(dtype: torch.dtype, width: int) -> None:
        x, residual = (meta(ROWS, width, dtype=dtype, grad=True) for _ in range(2))
        backward(dropout_add(x, residual, dropout_p=0.1))

    for name, dtype, width, _ in scope.over(scope.widths):
        yield Case("dropout_add", f"{name} C={width}", partial(run, dtype, width))


def softmax_cases(scope: Scope) -> Iterator[Case]:
    from .softmax import softmax

    def run(dtype: torch.dtype, shape: tuple[int, ...], causal: bool) -> None:
        backward(softmax(meta(*shape, dtype=dtype, grad=True), scale=0.125, causal=causal))

    for name in scope.dtypes:
        for shape, causal in (((8, 12, 1024, 1024), True), ((8, 12, 1024, 1024), False), ((8, VOCABULARY), False)):
            label = f"{name} {'x'.join(map(str, shape))}{' causal' if causal else ''}"
            yield Case("softmax", label, partial(run, DTYPES[name], shape, causal))


def gelu_cases(scope: Scope) -> Iterator[Case]:
    from .gelu import bias_gelu, gelu

    def run(dtype: torch.dtype, width: int, approximate: str, bias: bool) -> None:
        x = meta(ROWS, 4 * width, dtype=dtype, grad=True)
        if bias:
            backward(bias_gelu(x, meta(4 * width, dtype=dtype, grad=True), approximate))
        else:
            backward(gelu(x, approximate))

    for name, dtype, width, variants in scope.over(scope.widths):
        for approximate, bias in itertools.product(("tanh", "none") if variants else ("tanh",), (False, True)):
            label = f"{name} N={4 * width} {approximate}"
            yield Case("bias_gelu" if bias else "gelu", label, partial(run, dtype, width, approximate, bias))


def linear_cases(scope: Scope) -> Iterator[Case]:
    from .linear import linear, mlp

    def parameters(dtype: torch.dtype, n: int, k: int, bias: bool = True) -> tuple[Tensor, Tensor | None]:
        return meta(n, k, dtype=dtype, grad=True), meta(n, dtype=dtype, grad=True) if bias else None

    def run(dtype: torch.dtype, rows: int, width: int, bias: bool, activation: str) -> None:
        grad = rows == ROWS
        with contextlib.nullcontext() if grad else torch.no_grad():
            y = linear(
                meta(rows, width, dtype=dtype, grad=True), *parameters(dtype, 4 * width, width, bias), activation
            )
        if grad:
            backward(y)

    def run_mlp(dtype: torch.dtype, width: int, activation: str, residual: torch.dtype | None = None) -> None:
        layers = *parameters(dtype, 4 * width, width), *parameters(dtype, width, 4 * width)
        beside = None if residual is None else meta(ROWS, width, dtype=residual, grad=True)
        backward(mlp(meta(ROWS, width, dtype=dtype, grad=True), *layers, activation, beside))

    for name, dtype, width, variants in scope.over(scope.widths, products=True):
        label = f"{name} C={width}"
        for activation in ("gelu_tanh", "gelu", "relu") if variants else ("gelu_tanh",):
            for rows in (ROWS, 128, 1):
                yield Case(
                    "linear", f"{label} M={rows} {activation}", partial(run, dtype, rows, width, True, activation)
                )
            yield Case("mlp", f"{label} M={ROWS} {activation}", partial(run_mlp, dtype, width, activation))
        # as under autocast, and without
        for residual in (torch.float32, dtype) if dtype.itemsize == 2 else ():
            beside = partial(run_mlp, dtype, width, "gelu_tanh", residual)
            yield Case("mlp", f"{label} M={ROWS} residual in {8 * residual.itemsize} bits", beside)
        if variants:
            yield Case("linear", f"{label} M={ROWS} no bias", partial(run, dtype, ROWS, width, False, "gelu_tanh"))


def attention_cases(scope: Scope) -> Iterator[Case]:
    from .attention import attention, packed_attention

    def run(dtype: torch.dtype, head_size: int, causal: bool, dropout_p: float, documents: bool = False) -> None:
        qkv = meta(8, 1024, 3, 12, head_size, dtype=dtype, grad=True)
        first = meta(8, 1024, dtype=torch.int32) if documents else None
        out = packed_attention(qkv, causal, dropout_p=dropout_p, first=first)
        backward(out.transpose(1, 2).reshape(8, 1024, -1))

    def run_prefill(dtype: torch.dtype, head_size: int) -> None:
        q, k, v = (meta(8, 12, length, head_size, dtype=dtype) for length in (128, 1024, 1024))
        attention(q, k, v)

    for name, dtype, head_size, variants in scope.over(scope.head_sizes, products=True):
        if dtype == torch.float64 and head_size > 128:
            continue  # refused
        label = f"{name} D={head_size}"
        yield Case("attention", f"{label} causal", partial(run, dtype, head_size, True, 0.0))
        yield Case("attention", f"{label} causal dropout", partial(run, dtype, head_size, True, 0.1))
        if scope.documents:
            yield Case("attention", f"{label} documents", partial(run, dtype, head_size, True, 0.0, True))
        yield Case("attention", f"{label} prefill", partial(run_prefill, dtype, head_size))
        if variants:
            yield Case("attention", f"{label} not causal", partial(run, dtype, head_size, False, 0.0))
            yield Case("attention", f"{label} documents dropout", partial(run, dtype, head_size, True, 0.1, True))


def decode_attention_cases(scope: Scope) -> Iterator[Case]:
    from .decode import decode_attention

    def run(dtype: torch.dtype, head_size: int, batch: int, queries: int, padded: bool = False) -> None:
        q, k, v = (meta(batch, 12, length, head_size, dtype=dtype) for length in (queries, 1024, 1024))
        lengths, first = meta(batch, dtype=torch.int32), meta(batch, dtype=torch.int32)
        decode_attention(q, k, v, lengths, first if padded else None)

    for name, dtype, head_size, _ in scope.over(scope.head_sizes, products=True):
        for batch, queries in itertools.product((1, 64), (1, 4)):
            label = f"{name} D={head_size} B={batch} T={queries}"
            yield Case("decode_attention", label, partial(run, dtype, head_size, batch, queries))
        for queries in (1, 4):
            label = f"{name} D={head_size} B=64 T={queries} padded"
            yield Case("decode_attention", label, partial(run, dtype, head_size, 64, queries, True))


def decode_token_cases(scope: Scope) -> Iterator[Case]:
    from . import decode_token as ops

    def run(dtype: torch.dtype, width: int, heads: int, batch: int, how: str) -> None:
        dependent = arch(torch.device("meta")) >= 90  # the design of an engine there
        if how.startswith(("plain", "ahead")) and not dependent:
            return
        int8 = how.endswith("int8")

        def matrix(n: int, k: int) -> tuple[Tensor, Tensor]:
            return meta(n, k, dtype=torch.int8 if int8 else dtype), meta(n, dtype=dtype)

        norm = meta(width, dtype=dtype), meta(width, dtype=dtype)
        square, up, down = matrix(width, width), matrix(4 * width, width), matrix(width, 4 * width)
        layer = ops.LayerWeights(*norm, *square, *square, *square, *square, *norm, *up, *down)
        tables = meta(VOCABULARY, width, dtype=dtype), meta(1024, width, dtype=dtype)
        weights = ops.TokenWeights(*tables, (layer, layer), *norm, tables[0], None)
        if int8:
            scales = ops.LayerScales(*(meta(n) for n in (width, width, width, width, 4 * width, width)))
            head = meta(VOCABULARY, width, dtype=torch.int8)
            weights = weights._replace(head=head, scales=(scales, scales), head_scale=meta(VOCABULARY))
        keys, values = (meta(2, batch, heads, 1024, width // heads, dtype=dtype) for _ in range(2))
        tokens, positions = meta(batch, dtype=torch.int64), meta(batch, dtype=torch.int32)
        buffers = ops.token_buffers(weights, batch, heads, 1024, VOCABULARY)
        ahead = ops.plan_ahead(weights) if how.startswith("ahead") else None
        ops.decode_token(
            tokens, positions, weights, keys, values, buffers, pdl=dependent and how != "plain", ahead=ahead
        )

    for name, dtype, width, variants in scope.over(scope.widths):
        ways = [("", batch) for batch in (1, 2, 4, 8)]
        if variants:
            ways += [(how, batch) for how in ("plain", "ahead", "int8") for batch in (1, 8)]
        for how, batch in ways:
            label = f"{name} C={width} B={batch} {how}".strip()
            yield Case("decode_token", label, partial(run, dtype, width, WIDTHS[width], batch, how))


def sample_tokens_cases(scope: Scope) -> Iterator[Case]:
    from .sampling import STOPS, Draws, draw_tokens, sample_tokens

    def run_in_place(dtype: torch.dtype, batch: int, options: dict[str, Any]) -> None:
        sizes = {"seed": 1, "rows": batch, "positions": batch, "stops": STOPS, "ended": batch, "tokens": batch}
        dtypes = {"rows": torch.int32, "positions": torch.int32, "ended": torch.uint8}
        state = {name: meta(size, dtype=dtypes.get(name, torch.int64)) for name, size in sizes.items()}
        seen = meta(batch, VOCABULARY, dtype=torch.uint8) if "repetition_penalty" in options else None
        draws = Draws(**state, drawn=meta(16, batch, dtype=torch.int64), seen=seen)
        draw_tokens(meta(batch, VOCABULARY, dtype=dtype), draws, **options)

    def run(dtype: torch.dtype, batch: int, options: dict[str, Any]) -> None:
        seed, positions = meta(1, dtype=torch.int64), meta(batch, dtype=torch.int32)
        penalised = options.get("repetition_penalty", 1.0) != 1.0
        seen = torch.empty(batch, VOCABULARY, dtype=torch.bool, device="meta") if penalised else None
        sample_tokens(meta(batch, VOCABULARY, dtype=dtype), seed, positions, seen=seen, **options)

    filters: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "temperature": {"temperature": 0.8}, "top-k top-p": filters}
    if scope.variants:
        ways["top-k"] = {"temperature": 1.0, "top_k": 50}
        ways["top-p"] = {"temperature": 1.0, "top_p": 0.9}
        ways["all filters"] = filters | {"min_p": 0.01, "repetition_penalty": 1.2}
        ways["greedy penalty"] = {"repetition_penalty": 1.2}
    for name, (label, options) in itertools.product(scope.dtypes, ways.items()):
        yield Case("sample_tokens", f"{name} {label}", partial(run, DTYPES[name], 8, options))
    for label in ("greedy", "greedy penalty") if scope.variants else ("greedy",):
        yield Case("sample_tokens", f"fp32 in place {label}", partial(run_in_place, torch.float32, 8, ways[label]))


def cross_entropy_cases(scope: Scope) -> Iterator[Case]:
    from .cross_entropy import cross_entropy, linear_cross_entropy, linear_cross_entropy_with_statistics

    def run(dtype: torch.dtype, V: int, reduction: str, grad: bool) -> None:
        loss = cross_entropy(meta(ROWS, V, dtype=dtype, grad=grad), meta(ROWS, dtype=torch.int64), reduction=reduction)
        if grad:
            backward(loss)

    def run_linear(dtype: torch.dtype, width: int, reduction: str) -> None:
        x, weight = meta(ROWS, width, dtype=dtype, grad=True), meta(VOCABULARY, width, dtype=dtype, grad=True)
        backward(linear_cross_entropy(x, weight, meta(ROWS, dtype=torch.int64), reduction=reduction))

    def run_smoothed(dtype: torch.dtype) -> None:
        x, weight = meta(ROWS, 768, dtype=dtype, grad=True), meta(VOCABULARY, 768, dtype=dtype, grad=True)
        targets = meta(ROWS, dtype=torch.int64)
        backward(linear_cross_entropy_with_statistics(x, weight, targets, label_smoothing=0.1, z_loss=1e-4)[0])

    for name, V in itertools.product(scope.dtypes, (VOCABULARY, 50304)):
        for reduction, grad in itertools.product(("mean", "sum", "none"), (True, False)):
            label = f"{name} V={V} {reduction}{'' if grad else ' no grad'}"
            yield Case("cross_entropy", label, partial(run, DTYPES[name], V, reduction, grad))
    for name in scope.dtypes:
        yield Case("linear_cross_entropy", f"{name} smoothed", partial(run_smoothed, DTYPES[name]))
    for name, dtype, width, _ in scope.over(scope.widths):
        for reduction in ("mean", "none"):
            yield Case(
                "linear_cross_entropy", f"{name} C={width} {reduction}", partial(run_linear, dtype, width, reduction)
            )


CASES: dict[tuple[str, ...], Callable[[Scope], Iterable[Case]]] = {
    ("embedding",): embedding_cases,
    ("layer_norm", "add_layer_norm"): layer_norm_cases,
    ("dropout_add",): dropout_add_cases,
    ("softmax",): softmax_cases,
    ("gelu", "bias_gelu"): gelu_cases,
    ("linear", "mlp"): linear_cases,
    ("attention",): attention_cases,
    ("decode_attention",): decode_attention_cases,
    ("decode_token",): decode_token_cases,
    ("sample_tokens",): sample_tokens_cases,
    ("cross_entropy", "linear_cross_entropy"): cross_entropy_cases,
}

from __future__ import annotations

import importlib
import math

import pytest
import torch
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt import reference
from fastgpt_kernels import decode_attention

module = importlib.import_module("fastgpt_kernels.decode")

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [torch.float32, torch.float16]


def small_splits(target):
    """Splits so small that caches the interpreter can bear have more of them than are combined at once."""
    target.SPLIT_KEYS, target.COMBINE_SPLITS = 16, 2
    return target


@pytest.fixture(autouse=True)
def _small_splits(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        for name in ("SPLIT_KEYS", "COMBINE_SPLITS"):
            monkeypatch.setattr(module, name, getattr(module, name))
        small_splits(module)


def problem(B, H, T, S, D, lengths, dtype=torch.float32, device="cpu", unused=math.nan):
    """q, caches with `unused` behind each row's length, lengths."""
    q, k, v = (torch.randn(B, H, n, D, device=device).to(dtype) for n in (T, S, S))
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = unused, unused
    return [q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)]


def compare(ours, q, k, v, lengths, first=None):
    out = ours(q, k, v, lengths, first)
    theirs = reference.decode_attention(q, k, v, lengths, first)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths, first)
    assert_as_accurate_as_torch(out, theirs, exact)
    return out


SHAPES = [
    (3, 2, 1, 70, 16, [70, 0, 17]),
    (2, 1, 1, 16, 64, [16, 1]),
    (2, 1, 1, 257, 8, [257, 250]),
    (1, 2, 1, 40, 80, [33]),
    (2, 1, 1, 20, 100, [19, 20]),
    (1, 1, 1, 20, 256, [18]),
    (1, 1, 1, 7, 1, [7]),
    (3, 2, 4, 40, 16, [40, 3, 0]),  # a row of 3 positions hides them from the first of 4 queries
    (2, 1, 16, 40, 96, [32, 33]),
    (2, 1, 19, 40, 24, [40, 25]),
    (1, 1, 2, 17, 128, [17]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_attention(shape, dtype, device):
    out = compare(decode_attention, *problem(*shape, dtype, device))
    assert out.transpose(1, 2).is_contiguous()


def test_float64(device):
    for T in (1, 3):
        compare(decode_attention, *problem(2, 1, T, 40, 24, [40, 9], torch.float64, device))


@pytest.mark.parametrize("T", [1, 3])
def test_widest_heads(T, device, monkeypatch):
    """Splits are shorter where 64 keys and values of a head wouldn't fit a program."""
    monkeypatch.setattr(module, "SPLIT_KEYS", 64)
    for D in (130, 256):
        compare(decode_attention, *problem(2, 1, T, 70, D, [70, 9], torch.float64, device))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("one ")])
def test_layouts(layout, T, device):
    q, k, v, lengths = problem(2, 2, T, 40, 16, [40, 21], torch.float16, device, unused=1.0)
    compare(decode_attention, *(LAYOUTS[layout](t) for t in (q, k, v)), lengths)


def test_caches_of_other_strides(device):
    q, k, v, _ = problem(2, 2, 1, 40, 16, [40, 40], device=device)
    cache = torch.stack([k, v], dim=2).transpose(0, 3)  # [S, H, 2, B, D] memory seen as [B, H, 2, S, D]
    k, v = cache.contiguous().transpose(0, 3).unbind(2)
    lengths = torch.tensor([[40], [13]], dtype=torch.int32, device=device)[:, 0].expand(2)
    compare(decode_attention, q, k, v, lengths)
    compare(decode_attention, q[:, :1].expand(2, 2, 1, 16), k[:1].expand(k.shape), v, lengths[:1].expand(2))


@pytest.mark.parametrize("T", [1, 3])
def test_a_row_depends_on_neither_its_batch_nor_the_capacity(T, device):
    q, k, v, lengths = problem(3, 2, T, 80, 16, [37, 80, 5], device=device)
    together = decode_attention(q, k, v, lengths)
    for b, length in enumerate((37, 80, 5)):
        for capacity in (length, 80):
            row = slice(b, b + 1)
            alone = decode_attention(q[row], k[row, :, :capacity], v[row, :, :capacity], lengths[row])
            assert torch.equal(alone, together[row])


@pytest.mark.parametrize("T", [1, 3])
def test_a_row_padded_on_its_left_is_the_row_without_its_padding(T, device):
    lengths, padding = [80, 75, 40, 50, 33], [0, 37, 33, 50, -5]  # the fourth is padding alone: it sees nothing
    q, k, v, lengths = problem(5, 2, T, 80, 16, lengths, device=device)
    k[2, :, :33], v[2, :, :33] = 1e4, -1e4
    first = torch.tensor(padding, dtype=torch.int32, device=device)
    out = compare(decode_attention, q, k, v, lengths, first)
    assert not out[3].any()
    for b in (1, 2):
        row, real = slice(b, b + 1), slice(padding[b], None)
        alone = q[row], k[row, :, real], v[row, :, real]
        theirs = reference.decode_attention(*alone, lengths[row] - padding[b])
        exact = reference.decode_attention(*(t.double() for t in alone), lengths[row] - padding[b])
        assert_as_accurate_as_torch(out[row], theirs, exact)
    assert torch.equal(decode_attention(q, k, v, lengths, torch.zeros_like(first)), decode_attention(q, k, v, lengths))


@pytest.mark.parametrize("T", [1, 3])
def test_nan_and_inf_of_visible_keys(T, device):
    q, k, v, lengths = problem(2, 2, T, 40, 16, [40, 20], device=device)
    q[0, 0, :, 3] = math.nan
    k[0, 1, 2, 3] = math.nan
    v[1, 0, 4, 5] = math.inf
    compare(decode_attention, q, k, v, lengths)


@pytest.mark.parametrize("T", [1, 3])
def test_extreme_scores(T, device):
    q, k, v, lengths = problem(2, 1, T, 40, 16, [40, 20], device=device)
    compare(decode_attention, q * 100, k * 100, v, lengths)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[..., :17, 0] = -math.inf  # a whole split and a key of the next whose scores are -inf
    compare(decode_attention, q, k, v, lengths)


@pytest.mark.parametrize("shape", [(0, 2, 1, 8, 4), (2, 0, 1, 8, 4), (2, 2, 0, 8, 4), (2, 2, 1, 0, 4)])
def test_empty(shape, device):
    B, _, _, S, _ = shape
    q, k, v, lengths = problem(*shape, [S] * B, device=device)
    out = decode_attention(q, k, v, lengths)
    assert out.shape == q.shape
    assert not out.any()


def test_lengths_beyond_the_capacity_read_no_further(device):
    q, k, v, lengths = problem(2, 1, 1, 20, 16, [20, 20], device=device)
    assert torch.equal(decode_attention(q, k, v, lengths + 50), decode_attention(q, k, v, lengths))


def test_opcheck_and_compile(device):
    for T in (1, 2):
        arguments = problem(2, 2, T, 20, 8, [20, 7], device=device, unused=1.0)
        for first in (None, torch.tensor([3, 0], dtype=torch.int32, device=device)):
            torch.library.opcheck(module.decode_attention_fwd.op, (*arguments, first))
    compiled = torch.compile(lambda *t: decode_attention(*t) + 1.0, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), decode_attention(*arguments) + 1.0, rtol=0, atol=0)


def test_autocast(device):
    q, k, v, lengths = problem(2, 1, 1, 20, 16, [20, 7], device=device, unused=1.0)
    with torch.autocast(device.type, dtype=torch.float16):
        out = decode_attention(q, k, v, lengths)
        half = decode_attention(q, k.half(), v.half(), lengths)
    assert out.dtype == half.dtype == torch.float16
    torch.testing.assert_close(out, decode_attention(q.half().float(), k, v, lengths).half(), rtol=0, atol=0)
    assert torch.equal(half, decode_attention(q.half(), k.half(), v.half(), lengths))


def test_a_gradient_is_refused(device):
    q, k, v, lengths = problem(1, 1, 1, 4, 8, [4], device=device)
    k.requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient.*use attention"):
        decode_attention(q, k, v, lengths)
    with torch.no_grad():
        decode_attention(q, k, v, lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(1, 2, 8)}, r"q must be \[B, H, T, D\].*got q torch.float32 \(1, 2, 8\)"),
        ({"q": torch.ones(1, 3, 1, 8)}, r"got q torch.float32 \(1, 3, 1, 8\)"),
        ({"v_cache": torch.ones(1, 2, 5, 8)}, r"v_cache torch.float32 \(1, 2, 5, 8\)"),
        ({"q": torch.ones(1, 2, 1, 8).half()}, "share a dtype, got q torch.float16"),
        ({"k_cache": torch.ones(1, 2, 4, 8, dtype=torch.int32)}, "k_cache must be float16"),
        (
            {name: torch.ones(1, 1, 2, 257) for name in ("q", "k_cache", "v_cache")},
            "head size must be 1 to 256, got 257",
        ),
        ({"lengths": torch.ones(1, dtype=torch.int64)}, r"lengths must be int32 of shape \(1,\), got torch.int64"),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, r"got torch.int32 \(2,\)"),
        (
            {"first": torch.ones(1, 1, dtype=torch.int32)},
            r"first must be int32 of shape \(1,\), got torch.int32 \(1, 1\)",
        ),
        ({"lengths": torch.ones(1, dtype=torch.int32, device="meta")}, "lengths on meta"),
    ],
)
def test_bad_input(change, message, device):
    q, cache, lengths = torch.ones(1, 2, 1, 8), torch.ones(1, 2, 4, 8), torch.ones(1, dtype=torch.int32)
    arguments = {"q": q, "k_cache": cache, "v_cache": cache, "lengths": lengths} | change
    arguments = {name: a if a.device.type == "meta" else a.to(device) for name, a in arguments.items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


def test_offsets_beyond_int32(device):
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)
    far = 2**31 + 64
    layouts = [(far, 32, 16, 1), (32, far, 16, 1), (32, 64, far, 1)]
    tensors = [storage.as_strided((2, 2, 2, 16), layout, 512 * i) for i, layout in enumerate(layouts)]
    near = [t.copy_(torch.randn(t.shape)).clone() for t in tensors]
    lengths = torch.tensor([2, 1], dtype=torch.int32, device=device)
    torch.testing.assert_close(decode_attention(*tensors, lengths), decode_attention(*near, lengths), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("T", "original", "changed"),
    [
        (1, "end = tl.minimum(length, S)", "end = S"),
        (1, "total += tl.sum(weights, 0)", "total += tl.sum(weights, 0) * 0.99"),
        (1, "m + tl.log2(l)", "m"),
        (1, "scale_head(part, (1.0 / l)[:, None])", "part"),
        (1, "v_ptr += b * _in_steps(stride_vb, STEP)", "v_ptr += h * _in_steps(stride_vb, STEP)"),
        (1, "stride // STEP * STEP", "stride // STEP"),
        (1, "* D**-0.5", "* D**-0.4"),
        (3, "length - T + rows[:, None]", "length - T + rows[:, None] + 1"),
        (3, "length - T + rows[:, None]", "length - T"),
        (3, "tl.where(empty, float(\"-inf\"), m + tl.log2(l))", "m + tl.log2(l)"),
        (3, 'm = tl.where(m == float("-inf"), 0.0, m)\n    p =', "p ="),
        (3, "scale_head(part, (1.0 / l)[:, None])", "part"),
        (1, "cols[None, :] >= first", "cols[None, :] > first"),
        (1, "(split + 1) * BLOCK_N > first", "split * BLOCK_N > first"),
        (1, "0) // BLOCK_N", "0) // BLOCK_N + 1"),
    ],
)  # fmt: skip
def test_mutants_are_caught(T, original, changed):
    if torch.cuda.is_available():
        pytest.skip("mutants run in the interpreter")
    broken = small_splits(mutant("decode", original, changed))
    first = torch.tensor([20, 0, 7], dtype=torch.int32)
    with pytest.raises(AssertionError):
        compare(broken.decode_attention, *problem(3, 2, T, 40, 24, [40, 2, 18]), first)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_bfloat16_at_gpt2_shapes(D, T, device):
    compare(decode_attention, *problem(4, 12, T, 1024, D, [1024, 1, 0, 777], torch.bfloat16, device))


@pytest.mark.gpu
def test_bit_equal_250_times(device):
    arguments = problem(8, 12, 1, 1024, 64, [1024, 1, 0, 777, 512, 64, 65, 63], torch.bfloat16, device)
    first = decode_attention(*arguments)
    assert all(torch.equal(decode_attention(*arguments), first) for _ in range(250))


@pytest.mark.gpu
def test_one_cuda_graph_serves_a_growing_cache(device):
    q, k, v, lengths = problem(2, 12, 1, 1024, 64, [1024, 1024], torch.bfloat16, device)
    decode_attention(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths)
    for length in (1, 64, 65, 1000):
        lengths.copy_(torch.tensor([length, length // 2], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, lengths))


@pytest.mark.gpu
def test_no_recompilation_as_the_cache_grows(device):
    def kernels():
        return sum(len(cache[0]) for kernel in compiled for cache in kernel.device_caches.values())

    compiled = (module._decode_split_kernel, module._decode_combine_kernel)
    q, k, v, lengths = problem(1, 12, 1, 2048, 64, [9], torch.bfloat16, device)
    decode_attention(q, k[:, :, :10].contiguous(), v[:, :, :10].contiguous(), lengths)
    before = kernels()
    for S in (1, 11, 16, 17, 1024, 2048):
        decode_attention(q, k[:, :, :S].contiguous(), v[:, :, :S].contiguous(), lengths)
    assert kernels() == before

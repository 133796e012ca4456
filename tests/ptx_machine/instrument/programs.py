"""Kernels that several tests of the machine run, and edits of their PTX."""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from ptx_machine.machine import machine
from triton.tools.tensor_descriptor import TensorDescriptor


def on(arch, **options):
    """A machine that watches every uninitialised tensor."""
    return machine(arch, callers=("",), **options)


def kinds(m):
    return {f.kind for f in m.errors()}


def cut(pattern, which):
    """PTX without the which-th line that matches."""

    def change(text):
        found = list(re.finditer(rf"^.*{pattern}.*\n", text, re.M))
        at = found[which]
        return text[: at.start()] + "\n" + text[at.end() :]

    return change


def occurrences(arch, run, pattern):
    texts = []
    with on(arch, change=lambda t: texts.append(t) or t) as m:
        run(m)
    return len(re.findall(pattern, texts[0]))


@triton.jit
def matmul_kernel(
    a,
    b,
    out,
    M,
    N,
    K,
    sam,
    sak,
    sbk,
    sbn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), ACC)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * sam + ks[None, :] * sak, mask=(rows[:, None] < M) & (ks[None, :] < K), other=0)
        y = tl.load(b + ks[:, None] * sbk + cols[None, :] * sbn, mask=(ks[:, None] < K) & (cols[None, :] < N), other=0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        out + rows[:, None] * N + cols[None, :],
        acc.to(out.dtype.element_ty),
        mask=(rows[:, None] < M) & (cols[None, :] < N),
    )


def run_matmul(m, a, b, out, warps=4, stages=3, precision="ieee", acc=tl.float32, blocks=(64, 64, 32)):
    (M, K), N = a.shape, b.shape[1]
    bm, bn, bk = blocks
    m.run(
        matmul_kernel,
        (triton.cdiv(M, bm), triton.cdiv(N, bn)),
        a,
        b,
        out,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        BM=bm,
        BN=bn,
        BK=bk,
        ACC=acc,
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
    )


@triton.jit
def reduce_kernel(x, sums, tops, places, lows, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    i = tl.arange(0, N if AXIS == 0 else M)
    tl.store(sums + i, tl.sum(v, AXIS))
    tl.store(tops + i, tl.max(v, AXIS))
    tl.store(places + i, tl.argmax(v, AXIS))
    tl.store(lows + i, tl.min(v, AXIS))


@triton.jit
def box_matmul_kernel(
    a,
    b,
    out,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TA: tl.constexpr,
    TB: tl.constexpr,
    STAGES: tl.constexpr,
):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        x = a.load([k, m]).T if TA else a.load([m, k])
        y = b.load([n, k]).T if TB else b.load([k, n])
        acc = tl.dot(x, y, acc)
    out.store([m, n], acc.to(out.dtype))


def run_box_matmul(m, layout="nn", dtype=torch.bfloat16, blocks=(64, 64, 64), stages=3, warps=4, shape=(100, 72, 200)):
    (M, N, K), (bm, bn, bk) = shape, blocks
    ta, tb = layout[0] == "t", layout[1] == "t"
    a = torch.randn(*((K, M) if ta else (M, K))).to(dtype)
    b = torch.randn(*((N, K) if tb else (K, N))).to(dtype)
    pad = [torch.zeros(*(-(-s // 8) * 8 for s in t.shape), dtype=dtype) for t in (a, b)]
    for p, t in zip(pad, (a, b), strict=True):
        p[: t.shape[0], : t.shape[1]] = t
    a, b = (p[: t.shape[0], : t.shape[1]] for p, t in zip(pad, (a, b), strict=True))
    out = torch.empty(M, N, dtype=dtype)
    describe = TensorDescriptor.from_tensor
    m.run(
        box_matmul_kernel,
        (triton.cdiv(M, bm), triton.cdiv(N, bn)),
        describe(a, [bk, bm] if ta else [bm, bk]),
        describe(b, [bn, bk] if tb else [bk, bn]),
        describe(out, [bm, bn]),
        M,
        N,
        K,
        BM=bm,
        BN=bn,
        BK=bk,
        TA=ta,
        TB=tb,
        STAGES=stages,
        num_warps=warps,
    )
    x, y = (a.T if ta else a).double(), (b.T if tb else b).double()
    return out, x @ y


def run_pipeline(m, warps=4):
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16()
    out = torch.empty(64, 64)
    run_matmul(m, a, b, out, warps=warps)
    return out, a.float() @ b.float()


def run_reduction(m):
    x = torch.randn(256, 64)
    outs = [torch.empty(64, dtype=t) for t in (torch.float32, torch.float32, torch.int32, torch.float32)]
    m.run(reduce_kernel, (1,), x, *outs, M=256, N=64, AXIS=0)

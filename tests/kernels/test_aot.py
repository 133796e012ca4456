"""Ahead of time: every production kernel compiles for GPUs that aren't here, within the rules, and the gate has teeth."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch

from fastgpt_kernels import _aot_cases, aot
from fastgpt_kernels._aot_races import races
from fastgpt_kernels._aot_rules import Row, judge
from fastgpt_kernels._aot_sass import parse
from fastgpt_kernels._aot_waves import waves
from fastgpt_kernels._launch import Launch

ROOT = pathlib.Path(__file__).parents[2]


def run(*command, interpret=None, cwd=ROOT):
    """Python in a process of its own, with Triton's compiler where conftest.py chose its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "report.json"
    finished = run("-m", "fastgpt_kernels.aot", "--quick", "--json", str(file))
    assert file.exists(), finished.stdout + finished.stderr
    return finished, json.loads(file.read_text())


def test_production_kernels_keep_the_rules(quick):
    finished, report = quick
    assert finished.returncode == 0, "\n".join(line for line in finished.stdout.splitlines() if line.startswith("FAIL"))
    assert report["failures"] == 0
    assert report["launches"] > report["compiled"] == len(report["rows"])
    for row in report["rows"]:
        assert row["spilled"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= row["shared_limit"]
        assert 0 < row["occupancy"] <= 1
        assert row["floor"].split()[0] in ("memory", "tensor")


def test_every_public_function_and_kernel_is_there(quick):
    _, report = quick
    names = {op for ops in _aot_cases.CASES for op in ops}
    for arch in aot.OF_QUICK:
        rows = [row for row in report["rows"] if row["arch"] == arch]
        # an op all of whose kernels another op needs as well has no row of its own
        assert {row["op"] for row in rows} >= names - {"linear", "linear_cross_entropy"}
        assert {row["kernel"] for row in rows} == set(_aot_cases.KINDS)


def test_tensor_cores_and_wide_loads(quick):
    _, report = quick
    for row in report["rows"]:
        if _aot_cases.KINDS[row["kernel"]].flops is not None:
            assert row["tensor_core"] in ("mma.sync", "wgmma")
        # two numbers a split; rows of an odd length once, to sort them for longer than reading takes
        if row["kernel"] not in ("_sample_pick_kernel", "_sample_sort_kernel"):
            assert row["widest_load"] >= 16
    hopper = {row["kernel"] for row in report["rows"] if row["arch"] == "sm90" and row["tensor_core"] == "wgmma"}
    assert hopper >= {"_gemm_kernel", "_attention_fwd_kernel", "_attention_bwd_kernel"}
    for row in report["rows"]:
        assert row["products"] > 0 if row["tensor_core"] == "wgmma" else row["products"] == -1


def test_refuses_the_interpreter():
    finished = run("-m", "fastgpt_kernels.aot", "--quick", interpret="1")
    assert finished.returncode == 2
    assert "TRITON_INTERPRET=1 replaces the compiler" in finished.stderr


@pytest.mark.parametrize("arguments", [["--arch", "sm75"], ["--arch", "h100"], ["--op", "layernorm"]])
def test_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit):
        aot.main(arguments)
    assert arguments[1] in capsys.readouterr().err


BAD_KERNELS = """
import sys
import torch, triton, triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from fastgpt_kernels import _aot_cases, aot
from fastgpt_kernels._launch import arch, launch


@triton.jit
def good(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n) + 1, mask=offsets < n)


@triton.jit
def narrow_loads(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets * 3 % n) + 1)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(tl.float16))


@triton.jit
def product_by_hand(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.sum(a[:, :, None].to(tl.float32) * b[None, :, :], axis=1))


@triton.jit
def dependent(w_ptr, x_ptr, y_ptr, EARLY: tl.constexpr, WAITS: tl.constexpr, RELEASES: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if RELEASES == 1:
        gdc_launch_dependents()
    if EARLY:
        w = tl.load(w_ptr + at)
    if WAITS:
        gdc_wait()
    if RELEASES == 2:
        gdc_launch_dependents()
    if not EARLY:
        w = tl.load(w_ptr + at)
    tl.store(y_ptr + at, w * tl.load(x_ptr + at))


@triton.jit
def chained(x_ptr, y_ptr, LINKS: tl.constexpr):
    at = tl.load(x_ptr)
    for _ in tl.static_range(LINKS - 1):
        at = tl.load(x_ptr + at)
    tl.store(y_ptr, at)


@triton.jit
def without_weights(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    gdc_wait()
    gdc_launch_dependents()
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def crowded(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@triton.jit
def wrong(x_ptr):
    tl.store(x_ptr, undefined)


@triton.jit
def stranger(x_ptr):
    tl.store(x_ptr, 0.0)


def cases(scope):
    x, y, a, b, c = (_aot_cases.meta(*s, dtype=torch.float16) for s in [(4096,), (4096,), (128, 4096), (4096, 256), (128, 256)])
    def only(hopper, label, kernel, grid, *args, **constants):
        def build():
            if (arch(x.device) == 90) == hopper:
                launch(kernel, (grid,), *args, **constants)

        return _aot_cases.Case("bad", label, build)

    for label, early, waits, releases in (
        ("in time", 1, 1, 1), ("late", 0, 1, 1), ("no wait", 1, 0, 1), ("no release", 1, 1, 0), ("late release", 1, 1, 2)
    ):
        how = {"EARLY": early, "WAITS": waits, "RELEASES": releases, "BLOCK": 1024}
        yield only(True, label, dependent, 1, x, y, x, launch_pdl=True, **how)
    numbers = _aot_cases.meta(4096, dtype=torch.int32)
    for links in (2, 3):
        yield only(True, f"{links} waves", chained, 1, numbers, numbers, LINKS=links)
    yield only(True, "exempt", without_weights, 1, x, y, BLOCK=1024, launch_pdl=True)
    yield only(False, "crowded", crowded, 500, x, y, BLOCK=8192, num_warps=32)
    yield only(False, "few", crowded, 200, x, y, BLOCK=16384, num_warps=32)
    for label, kernel, args, constants in (
        ("good", good, (x, y, 4096), {"BLOCK": 1024}),
        ("narrow", narrow_loads, (x, y, 4096), {"BLOCK": 1024}),
        ("shared", product, (a, b, c, 4096), {"M": 128, "N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 5}),
        ("spills", product, (a, b, c, 4096), {"M": 128, "N": 128, "BLOCK_K": 16, "num_warps": 2, "num_stages": 1}),
        ("may spill", product, (a, b, c, 4096), {"M": 128, "N": 256, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}),
        ("by hand", product_by_hand, (a, b, c), {"M": 16, "N": 16, "K": 16}),
        ("wrong", wrong, (x,), {}),
        ("stranger", stranger, (x,), {}),
    ):
        yield only(False, label, kernel, 1, *args, **constants)


stream = _aot_cases.STREAM
product_kind = _aot_cases.Kind(lambda arguments: 1e9, spills=lambda a: 4096 if a["N"] == 256 else 0)
kinds = {
    "dependent": stream, "without_weights": _aot_cases.Kind(weights=False), "crowded": _aot_cases.Kind(programs=lambda a: 3),
    "chained": _aot_cases.Kind(waves=lambda a: 2),
    "good": stream, "narrow_loads": stream, "product": product_kind, "product_by_hand": product_kind, "wrong": stream,
}
sys.exit(aot.main(["--arch", "sm80", "sm86", "sm90", "--json", "report.json"], {("bad",): cases}, kinds))
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_kernels.py").write_text(BAD_KERNELS)
    finished = run("bad_kernels.py", cwd=folder)
    assert (folder / "report.json").exists(), finished.stdout + finished.stderr
    return finished, json.loads((folder / "report.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("case", "arch", "problem"),
    [
        ("good", "sm80", None),
        ("good", "sm86", None),
        ("narrow", "sm80", "16-byte loads"),
        ("shared", "sm86", "bytes of shared memory of 101376"),
        ("spills", "sm80", "spills"),
        ("may spill", "sm80", None),
        ("by hand", "sm80", "without tensor cores"),
        ("wrong", "sm86", "doesn't compile"),
        ("stranger", "sm86", "not in KINDS"),
        ("crowded", "sm80", "fits a multiprocessor 2 times, and 3 are planned"),
        ("crowded", "sm86", "fits a multiprocessor 1 times, and 3 are planned"),
        ("few", "sm80", None),
        ("in time", "sm90", None),
        ("late", "sm90", "requests no weights before griddepcontrol.wait; the widest load there is 0 bytes"),
        ("no wait", "sm90", "no griddepcontrol.wait"),
        ("no release", "sm90", "no griddepcontrol.launch_dependents"),
        ("late release", "sm90", "PREEXIT comes after LDG"),
        ("2 waves", "sm90", None),
        ("3 waves", "sm90", "waits for loads 3 times before its first store, and 2 are planned"),
        ("exempt", "sm90", None),
    ],
)
def test_the_gate_has_teeth(bad, case, arch, problem):
    finished, rows = bad
    assert finished.returncode == 1
    (row,) = (row for row in rows if row["case"] == case and row["arch"] == arch)
    if problem is None:
        assert row["problems"] == []
    else:
        assert any(problem in found for found in row["problems"]), row


def test_what_may_spill_does(bad):
    """Or the allowance would have shown nothing."""
    spilled = [row["spilled"] for row in bad[1] if row["case"] == "may spill" and row["arch"] == "sm80"]
    assert len(spilled) == 1
    assert 0 < spilled[0] <= 4096


TWINS = """
from fastgpt_kernels import _aot_cases, aot

cases = [case for case in _aot_cases.cross_entropy_cases(_aot_cases.QUICK) if case.op == "cross_entropy"][:2]
sm80, sm86 = (aot.collect(cases, aot.parse_target(name)) for name in ("sm80", "sm86"))
assert sm80.keys() == sm86.keys()
for key in sm80:
    ((alone,),) = aot.compile_jobs([sm86[key]])
    sm80[key].twin = sm86[key]
    ((_, assembled),) = aot.compile_jobs([sm80[key]])
    alone.seconds = assembled.seconds = 0.0
    assert alone == assembled, (alone, assembled)
print("same")
"""


def test_sm86_from_the_ptx_of_sm80_is_what_sm86_alone_gives(tmp_path):
    (tmp_path / "twins.py").write_text(textwrap.dedent(TWINS))
    finished = run("twins.py", cwd=tmp_path)
    assert finished.stdout.strip().endswith("same"), finished.stdout + finished.stderr


# The loop of a flash attention forward for sm90, as nvdisasm prints it, less what computes.
ATTENTION = """
        /*1180*/                   LDGSTS.E.BYPASS.128 [R105], desc[UR24][R36.64], P0 ;
.L_x_1:
        /*1880*/                   DEPBAR.LE SB0, 0x2 ;
        /*1890*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*1b70*/                   WARPGROUP.ARRIVE ;
        /*1b80*/                   HGMMA.64x64x16.F32 R24, gdesc[UR12], RZ, !UPT ;
        /*1bd0*/                   HGMMA.64x64x16.F32 R24, gdesc[UR28], R24, gsb0 ;
        /*1be0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*1bf0*/                   FMUL R91, R27, R2.reuse ;
        /*1c00*/              @!P1 LDS.128 R88, [R10+0x20] ;
        /*4510*/                   WARPGROUP.ARRIVE ;
        /*4570*/                   HGMMA.64x64x16.F32 R56, R88, gdesc[UR8].tnspB, R56 ;
        /*4a80*/                   HGMMA.64x64x16.F32 R56, R92, gdesc[UR8].tnspB, R56, gsb0 ;
        /*4a88*/                   NOP ;
        /*4a90*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*4ad0*/                   LDGSTS.E.BYPASS.128 [R107], desc[UR24][R110.64], !P0 ;
        /*4ba0*/              @!P0 BRA `(.L_x_1) ;
        /*4c30*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*4d80*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*4d90*/                   STS.128 [R105], R56 ;
        /*4da0*/                   EXIT ;
"""
FIRST, SECOND = (0x1B80, 0x1BD0), (0x4570, 0x4A80)  # the products of a group


@pytest.mark.parametrize(
    ("at", "instead", "races_at", "kind", "products"),
    [
        (0x4DA0, "EXIT", None, "", ()),
        # the left operand of a product in flight: behind it, in the next iteration, by part of a wide register
        (0x4A88, "MOV R90, R3", 0x4A88, "left operand", SECOND[:1]),
        (0x1880, "IMAD.WIDE R94, R4, 0x4, R6", 0x1880, "left operand", SECOND[1:]),
        (0x1880, "LDSM.16.M88.4 R90, [R3]", 0x1880, "left operand", SECOND),
        (0x1880, "SHFL.BFLY PT, R91, R3, 0x2, 0x1f", 0x1880, "left operand", SECOND[:1]),
        (0x1880, "ISETP.GE.AND P0, PT, R88, R91, PT", None, "", ()),
        # a wait that lets one group go on is none for the last
        (0x1BE0, "WARPGROUP.DEPBAR.LE gsb0, 0x1", 0x1BF0, "accumulators", FIRST),
        # another warp group may not have waited yet, or this one has not
        (0x4A90, "NOP", 0x4AD0, "no barrier", SECOND),
        (0x4A90, "@P3 BAR.SYNC.DEFER_BLOCKING 0x0", 0x4AD0, "no barrier", SECOND),
        (0x4D80, "NOP", 0x4D90, "no barrier", SECOND),
        (0x4C30, "NOP", 0x4D90, "not waited for", SECOND),
    ],
)
def test_races_of_asynchronous_products(at, instead, races_at, kind, products):
    lines = [f"/*{at:04x}*/ {instead} ;" if f"/*{at:04x}*/" in line else line for line in ATTENTION.splitlines()]
    instructions = parse("\n".join(lines))
    assert len(instructions) == ATTENTION.count("/*")
    found = races(instructions)
    assert all(f"at {races_at:#x}" in race for race in found) if races_at else not found
    assert {
        product
        for product in (*FIRST, *SECOND)
        for race in found
        if f"product at {product:#x}" in race and kind in race
    } == {*products}


def test_races_and_unread_products_fail_the_gate():
    row = Row(
        "op", "case", "kernel", "sm90", "", 1, spilled=0, tensor_core="wgmma", programs=1, products=0, races=["a race"]
    )
    x = torch.empty(8, device="meta")
    problems = judge(row, Launch(None, (1,), (x,), {}), {}, 90, {"kernel": _aot_cases.Kind(lambda arguments: 1.0)})
    assert problems == ["has a wgmma that was not found in its machine code, and so not looked at for races", "a race"]


# Two loads on their way at once, a branch to an early exit, and a load whose address the first one answers.
LOADS = """
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R6.64] ;
        /*0030*/                   ISETP.GE.AND P0, PT, R3, R0, PT ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   IMAD.WIDE R4, R2, 0x4, R6 ;
        /*0060*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0070*/                   STG.E desc[UR4][R6.64], R3 ;
        /*0080*/                   LDG.E R1, desc[UR4][R6.64] ;
        /*0090*/                   EXIT ;
.L_x_1:
        /*00a0*/                   STG.E desc[UR4][R6.64], RZ ;
        /*00b0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("at", "instead", "expected"),
    [
        (0x10, "LDG.E R2, desc[UR4][R4.64]", 2),
        (0x50, "IMAD.WIDE R4, R3, 0x4, R6", 1),  # nothing of the loads is used before the store
        (0x50, "IMAD.WIDE R4, R11, 0x4, R6", 2),  # the last of four registers
        (0x30, "ISETP.GE.AND P0, PT, R2, R0, PT", 2),
        (0x50, "LDG.E R5, desc[UR4][R2.64]", 3),
    ],
)
def test_waves_of_loads(at, instead, expected):
    lines = [f"/*{at:04x}*/ {instead} ;" if f"/*{at:04x}*/" in line else line for line in LOADS.splitlines()]
    assert waves(parse("\n".join(lines))) == expected

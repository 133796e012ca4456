"""Every stage runs dry, goes on where it stopped, and refuses what it does not know."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from benchmark_cases import ROOT, op_case, subprocess_environment

from benchmarks import profiling, suite
from benchmarks.harness import resumed
from benchmarks.ops import gelu
from fastgpt.cli import main

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks.harness import floor_kernels as k
from benchmarks import sweep

target = GPUTarget("cuda", 90, 32)
pointers = {"counter_ptr": "*i32", "programs": "i32", "turns": "i32", "ASSEMBLY": "constexpr"}
for assembly in (False, True):
    options = {"num_warps": 8, "launch_cooperative_grid": True}
    triton.compile(ASTSource(k._barriers_kernel, pointers, {"ASSEMBLY": assembly}), target=target, options=options)
    ring = {"x_ptr": "*i32", "y_ptr": "*i32", **pointers, "BLOCK": "constexpr"}
    triton.compile(ASTSource(k._ring_kernel, ring, {"ASSEMBLY": assembly, "BLOCK": 256}), target=target, options=options)
    tiny = {"x_ptr": "*fp32", "DEPENDENT": "constexpr", "BLOCK": "constexpr"}
    done = triton.compile(
        ASTSource(k._tiny_kernel, tiny, {"DEPENDENT": assembly, "BLOCK": 256}), target=target, options={"launch_pdl": assembly}
    )
    assert ("griddepcontrol.wait" in done.asm["ptx"]) == assembly
read = {"x_ptr": "*bf16", "out_ptr": "*fp32", "N": "i32", "programs": "i32", "BLOCK": "constexpr"}
done = triton.compile(ASTSource(k._read_kernel, read, {"BLOCK": 8192}), target=target, options={"num_warps": 8})
constant = sweep.constants()["softmax-wide-unroll"]
print(sweep.limits(constant, constant.cases("gpu")[0], 90))
"""


def test_what_only_a_gpu_runs_compiles_for_one():
    command = [sys.executable, "-c", textwrap.dedent(COMPILE)]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = re.sub(r"\d+", "N", done.stdout.splitlines()[-1])  # how many is the compiler's affair
    assert found == "[[], [], ['_softmax_wide_fwd_kernel spills N bytes a thread']]"


STAGES = ("floors", "tests", "kernels", "train", "decode", "profile")  # the sweep is a step of test_first.py's


@pytest.fixture(scope="module")
def stage_results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


def run_stage(stage: str, results: Path) -> str:
    """With pytest and pytest-benchmark alone, as on a bare machine, and the records' folder given from where one is."""
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), stage, "--dry-run"]
    bare = "-p no:timeout -p no:xdist -p no:hypothesispytest"
    environment = subprocess_environment(OUT=results.name, PYTHON=sys.executable, PYTEST_ADDOPTS=bare)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550, cwd=results.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_dry(stage, stage_results):
    assert run_stage(stage, stage_results).strip()
    held = stage_results / f"{stage}.json"
    if stage != "tests":
        rows = json.loads(held.read_text())["rows"]
        assert {row["status"] for row in rows} <= {"ok", "absent"}, [row for row in rows if row["status"] != "ok"][:3]
        assert any(row["status"] == "ok" for row in rows)
    if stage == "kernels":
        ours = {row["benchmark"] for row in rows if row["provider"] == "fastgpt" and row["status"] == "ok"}
        assert ours == {b.name for b in suite.BENCHMARKS if b.group == "kernels"}


def test_tests_go_on_where_they_stopped(tmp_path, monkeypatch):
    """What passed is left out by a later call with the same sources; what failed, or wasn't begun, is not."""

    def left(names):
        items, dropped = [types.SimpleNamespace(nodeid=name) for name in names], []
        hook = types.SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
        plugin = resumed.Resumed(tmp_path / "passed.txt", until=100)
        plugin.pytest_collection_modifyitems(types.SimpleNamespace(hook=hook), items)
        assert len(items) + len(dropped) == len(names)
        return plugin, [item.nodeid for item in items]

    monkeypatch.setattr(resumed, "source_digest", lambda: "these")
    plugin, names = left(["a", "b", "c"])
    assert names == ["a", "b", "c"]
    for name, when, passed in (("a", "setup", True), ("b", "call", True), ("c", "call", False)):
        plugin.pytest_runtest_logreport(types.SimpleNamespace(nodeid=name, when=when, passed=passed))
    assert left(["a", "b", "c"])[1] == ["a", "c"]
    monkeypatch.setattr(resumed, "source_digest", lambda: "others")
    assert left(["a", "b", "c"])[1] == ["a", "b", "c"]
    late = resumed.Resumed(tmp_path / "passed.txt", until=-1)
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        late.pytest_runtest_setup(None)


def test_an_unknown_stage_or_option_is_refused():
    for arguments, message in ((["fly"], "unknown stage fly"), (["floors", "--fast"], "unknown option --fast")):
        command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=subprocess_environment(PYTHON=sys.executable)
        )
        assert done.returncode == 2
        assert message in done.stderr


def test_ncu_is_told_to_leave_the_clocks_alone(tmp_path, monkeypatch):
    fake = tmp_path / "ncu"
    fake.write_text('#!/bin/sh\necho "ncu $*"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    text = profiling.look("gelu", op_case(gelu.GELU).label, dry_run=True)
    assert "--clock-control none" in text
    assert "--one gelu rows=5 width=48 float32 forward --dry-run" in text


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attention_bwd_kernel", "attention, backward"),
        ("flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention, forward"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_NNT", "products"),
        ("_gemm_kernel", "products"),
        ("void at::native::vectorized_layer_norm_kernel", "norms"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_gelu_3", "activation"),
        ("_cross_entropy_kernel", "cross-entropy"),
        ("Memcpy DtoD", "copies and casts"),
    ],
)
def test_kernels_belong_to_parts(name, part):
    assert profiling.part_of(name) == part


def test_the_command_names_what_there_is(capfd):
    assert main(["bench", "attentoin"]) != 0
    printed = capfd.readouterr()
    assert "no benchmark is called 'attentoin'" in printed.out + printed.err
    assert main(["bench", "gelu", "--report"]) == 2
    assert "--report measures nothing" in capfd.readouterr().err

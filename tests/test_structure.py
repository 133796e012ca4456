"""The house's rules: which room may call which, equal signatures, what an import costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import cpu_products, ops, reference

ROOT = Path(__file__).parent.parent

# Each room may import the rooms of lower rank only; rooms of one rank don't know each other.
RANK = {
    "files": 0,
    "config": 0,
    "graphs": 0,
    "transfer": 0,
    "reference": 0,
    "cpu_products": 1,
    "ops": 2,
    "plan": 3,
    "text": 4,
    "inference": 5,
    "checkpoints": 5,
    "layers": 6,
    "model": 7,
    "evaluation": 8,
    "quantization": 8,
    "training": 8,
    "info": 8,
    "compat": 9,
    "commands": 9,
    "cli": 10,
    "__init__": 11,
    "__main__": 11,
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


MODULES = sorted(path.relative_to(ROOT / "fastgpt") for path in (ROOT / "fastgpt").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_arrows_point_down(path):
    room = path.parts[0].removesuffix(".py")
    assert room in RANK, f"give {room} a place in the house"
    for name in imports(ROOT / "fastgpt" / path):
        parts = name.split(".")
        if parts[0] == "fastgpt" and len(parts) > 1 and parts[1] in RANK:
            below = RANK[parts[1]] < RANK[room] or (parts[1] == room and len(path.parts) > 1)
            assert below or room == "__main__", f"{path} imports {parts[1]}, which is not below it"
        if parts[0] in ("triton", "fastgpt_kernels"):
            assert room == "ops", f"{path} imports {name}; only ops may"


def test_kernels_never_import_fastgpt():
    for path in (ROOT / "kernels" / "fastgpt_kernels").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "fastgpt"], path.name


@pytest.mark.parametrize("op", ops.OPS)
def test_ops_have_the_references_signature(op):
    assert inspect.signature(getattr(ops, op)) == inspect.signature(getattr(reference, op))


@pytest.mark.parametrize("op", cpu_products.OPS)
def test_products_on_a_cpu_take_what_the_reference_takes(op):
    """In order: what is the loss's alone may be passed through."""
    mine, theirs = (inspect.signature(getattr(room, op)).parameters for room in (cpu_products, reference))
    named = [name for name, parameter in mine.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    assert named == list(theirs)[: len(named)]
    assert len(named) == len(theirs) or list(mine)[-1] == "how"


def test_public_names_are_what_their_modules_define():
    for name in fastgpt.__all__:
        assert getattr(fastgpt, name) is getattr(importlib.import_module(f"fastgpt.{fastgpt._HOMES[name]}"), name)
    assert set(fastgpt.__all__) == set(fastgpt._HOMES) <= set(dir(fastgpt))
    with pytest.raises(AttributeError, match="no attribute 'GPT2'"):
        fastgpt.GPT2  # noqa: B018


def run(code: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=env, check=True
    )
    return done.stdout.strip()


def test_import_touches_neither_triton_nor_cuda_nor_the_network():
    code = """
import sys
before = set(sys.modules)
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
import fastgpt
assert not {"torch", "numpy"} & (set(sys.modules) - before), "names are to resolve when they are used"
import torch
before = set(sys.modules)
for name in fastgpt.__all__: getattr(fastgpt, name)
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "fastgpt_kernels", "tiktoken", "transformers", "tqdm", "matplotlib"}, new
assert not torch.cuda.is_initialized()
"""
    run(code)


def test_import_adds_under_0_3_s_to_torch():
    code = (
        "import torch, time; t = time.process_time(); import fastgpt; fastgpt.GPTModel; print(time.process_time() - t)"
    )
    assert any(float(run(code)) < 0.3 for _ in range(3))  # once is enough on an idle machine


def test_no_file_passes_450_lines():
    long = {
        str(path.relative_to(ROOT)): count
        for room in ("fastgpt", "kernels", "benchmarks", "examples", "tests")
        for path in (ROOT / room).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_wheel_holds_both_packages_and_nothing_called_kernels():
    import tomllib

    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["fastgpt", "kernels/fastgpt_kernels"]
    assert not (ROOT / "kernels" / "__init__.py").exists()

"""Lanes: without a GPU the Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped and counted."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: it is read where kernels are decorated

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.waste_no_time()
    interpreter.round_products_once()

collect_ignore = [
    "ptx_machine",
    "fake_gpu",
]  # each a process of its own, with its own pytest.ini: neither wants the interpreter


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("timeout"):  # pyproject.toml sets it; a borrowed machine may not have the plugin
        parser.addini("timeout", "pytest-timeout's, which isn't installed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "needs a CUDA device" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests skipped for want of a GPU")

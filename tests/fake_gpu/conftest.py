"""The lane of the pretended device: one for the whole process, built and put in torch's place before anything is collected."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton

import torch

from fake_gpu import device, guard, runtime

_problem: str | None = None


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "pytest-timeout's, which isn't installed")


def pytest_configure(config):
    global _problem
    torch.set_num_threads(1)
    if guard.compiler() is None:
        _problem = "no C++ compiler for guard.cpp"
        return
    cache = getattr(config, "cache", None)
    folder = Path(cache.mkdir("guard")) if cache is not None else Path(tempfile.mkdtemp())
    guard.load(guard.build(folder))
    runtime.install()
    device.install()


def pytest_collection_modifyitems(items):
    if _problem is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=_problem))


def pytest_terminal_summary(terminalreporter):
    if _problem is not None:
        skipped = len(terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(f"{skipped} tests of the pretended device skipped: {_problem}")


@pytest.fixture(autouse=True)
def _as_new():
    """A test leaves no capture, stream or generator behind."""
    torch.manual_seed(0)
    yield
    assert runtime.RUNTIME.as_new()

"""The executed lane: the real compiler, so not under TRITON_INTERPRET; samples of the many cases, rotated by a seed."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton


def pytest_addoption(parser, pluginmanager):
    parser.addoption("--all-cases", action="store_true", help="run every case")
    parser.addoption("--sample-seed", type=int, help="which cases of a group run; drawn when left out")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "pytest-timeout's, which isn't installed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.rootpath != Path(__file__).parent:
        raise pytest.UsageError("tests/ptx_machine is a run of its own: python -m pytest tests/ptx_machine")
    torch.set_num_threads(1)
    if config.option.sample_seed is None:
        told = getattr(config, "workerinput", {})
        config.option.sample_seed = told["sample_seed"] if told else random.randrange(10_000)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """xdist gives its workers the command line alone, so that each would draw a seed of its own."""
    node.workerinput["sample_seed"] = node.config.option.sample_seed


def pytest_report_header(config):
    return "cases: all" if config.option.all_cases else f"sampled cases: --sample-seed {config.option.sample_seed}"


def pytest_collection_modifyitems(config, items):
    """Of the cases of a group on one architecture, one; a seed's successor has the next."""
    if config.option.all_cases:
        return
    groups: dict[tuple, list] = {}
    for item in items:
        if marker := item.get_closest_marker("one_of"):
            groups.setdefault((*marker.args, item.callspec.params.get("arch")), []).append(item)
    left = set()
    for name, group in groups.items():
        chosen = (config.option.sample_seed + zlib.crc32(str(name).encode())) % len(group)
        left |= {item for i, item in enumerate(group) if i != chosen}
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=list(left))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    """A test in which nothing is wrong but what its Triton is known to leave out is an expected failure, named so.

    Its numbers and all other findings have been judged by then: it fails by them as ever.
    """
    from ptx_machine import machine

    machine.compilers = taken = []
    try:
        result = yield
    finally:
        machine.compilers = None
    if taken:
        places = len({(f.kernel, f.where) for f in taken})
        pytest.xfail(
            f"Triton {machine.triton.__version__} fences no cp.async before wgmma (triton 9610): {places} places"
        )
    return result


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def arch(request) -> int:
    return request.param

"""The executed lane: the real compiler, so not under TRITON_INTERPRET; samples of the many cases, rotated by a seed."""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton


def pytest_addoption(parser, pluginmanager):
    parser.addoption("--all-cases", action="store_true", help="run the cases marked sampled too, every one")
    parser.addoption("--sample-seed", type=int, help="which of the sampled cases run; drawn when left out")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "pytest-timeout's, which isn't installed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    torch.set_num_threads(1)
    if config.option.sample_seed is None:  # before xdist's workers start, who are told it
        config.option.sample_seed = random.randrange(10_000)


def pytest_report_header(config):
    return "cases: all" if config.option.all_cases else f"sampled cases: --sample-seed {config.option.sample_seed}"


def pytest_collection_modifyitems(config, items):
    if config.option.all_cases:
        return
    kept, left = [], []
    for item in items:
        marker = item.get_closest_marker("sampled")
        draw = zlib.crc32(f"{config.option.sample_seed} {item.nodeid}".encode())
        (kept if marker is None or draw % marker.args[0] == 0 else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def arch(request) -> int:
    return request.param

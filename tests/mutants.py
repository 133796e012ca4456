"""Broken copies of a kernel module, to show that the tests would notice."""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
import types
import unittest.mock
from collections.abc import Sequence

_count = itertools.count()


def mutant(module: str, original: str, changed: str) -> types.ModuleType:
    """`fastgpt_kernels.<module>` with the one occurrence of `original` in its source replaced by `changed`."""
    return mutants((module,), original, changed)[0]


def mutants(modules: Sequence[str], original: str, changed: str) -> list[types.ModuleType]:
    """Copies of `fastgpt_kernels`' modules, each of which imports the copies before it; `original` stands in one of them, once.

    Triton reads kernel sources through `inspect`, so the new source is put where `inspect` looks.
    """
    sources = {}
    for module in modules:
        path = importlib.import_module(f"fastgpt_kernels.{module}").__file__
        assert path is not None
        with open(path, encoding="utf-8") as file:
            sources[module] = file.read()
    count = sum(source.count(original) for source in sources.values())
    if count != 1:  # no AssertionError: that is what a caught mutant raises
        raise LookupError(f"{original!r} stands {count} times in {', '.join(modules)}, expected once")
    copies: dict[str, types.ModuleType] = {}
    with unittest.mock.patch.dict(sys.modules):
        for module, unchanged in sources.items():
            source = unchanged.replace(original, changed)
            name = f"mutant_{next(_count)}_{module}"
            filename = f"<{name}>"
            linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
            copy = types.ModuleType(name)
            copy.__file__ = filename
            copy.__package__ = (
                "fastgpt_kernels"  # so that its relative imports are the original's, or the copies before it
            )
            sys.modules[name] = copies[name] = copy
            exec(compile(source, filename, "exec"), copy.__dict__)
            sys.modules[f"fastgpt_kernels.{module}"] = copy
    sys.modules.update(copies)
    return list(copies.values())

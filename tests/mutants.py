"""Broken copies of a kernel module, to show that the tests would notice."""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
import types

_count = itertools.count()


def mutant(module: str, original: str, changed: str) -> types.ModuleType:
    """`fastgpt_kernels.<module>` with the one occurrence of `original` in its source replaced by `changed`.

    Triton reads kernel sources through `inspect`, so the new source is put where `inspect` looks.
    """
    path = importlib.import_module(f"fastgpt_kernels.{module}").__file__
    assert path is not None
    with open(path, encoding="utf-8") as file:
        source = file.read()
    if source.count(original) != 1:  # no AssertionError: that is what a caught mutant raises
        raise LookupError(f"{original!r} stands {source.count(original)} times in {module}.py, expected once")
    source = source.replace(original, changed)
    name = f"mutant_{next(_count)}_{module}"
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    copy = types.ModuleType(name)
    copy.__file__ = filename
    copy.__package__ = "fastgpt_kernels"  # so that its relative imports are the original's
    sys.modules[name] = copy
    exec(compile(source, filename, "exec"), copy.__dict__)
    return copy

"""What a launch asks of its surroundings."""

from __future__ import annotations

import numpy
import pytest
import triton

from fastgpt_kernels import _launch


@pytest.mark.parametrize(
    ("compiler", "arrays", "runs"),
    [("3.6.0", "2.5.5", False), ("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_an_interpreter_that_fails_in_every_loop_says_why(compiler, arrays, runs, monkeypatch):
    monkeypatch.setattr(triton, "__version__", compiler)
    monkeypatch.setattr(numpy, "__version__", arrays)
    if runs:
        _launch._check_interpreter.__wrapped__()
        return
    with pytest.raises(RuntimeError, match=rf"Triton {compiler} doesn't run with numpy {arrays}: install numpy<2\.4"):
        _launch._check_interpreter.__wrapped__()

"""A good checkpoint, and a way to say that a bad one is refused."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_models import same_bits, theirs
from torch import Tensor

from fastgpt import GPTModel
from fastgpt.checkpoints.weights import CheckpointError, load_pretrained


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """A checkpoint as transformers writes it."""
    directory = tmp_path_factory.mktemp("good")
    theirs().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def good_tensors(good) -> dict[str, Tensor]:
    return load_pretrained(good)[1]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def refused(good, good_tensors) -> Callable[..., str]:
    """Loading raises what it should, at no cost in memory, and the process goes on loading good files."""

    def check(
        source: Path, *messages: str, error: type[Exception] = CheckpointError, allow_pickle: bool = False
    ) -> str:
        before = peak_bytes()
        with pytest.raises(error) as caught:
            GPTModel.from_pretrained(source, allow_pickle=allow_pickle)
        for message in messages:
            assert message in str(caught.value)
        assert peak_bytes() - before < 300e6
        assert isinstance(caught.value, (ValueError, OSError))
        assert same_bits(load_pretrained(good)[1], good_tensors)
        return str(caught.value)

    return check

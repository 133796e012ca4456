"""Names: directories before the hub, and a hub out of reach."""

from __future__ import annotations

import importlib.util
from typing import Any

import huggingface_hub
import pytest
from checkpoint_models import same_bits, sharp

from fastgpt import GPTModel
from fastgpt.checkpoints import weights
from fastgpt.checkpoints.weights import load_pretrained


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "~/model", "a/b/c", "/absent/dir", "GPT2"])
def test_names_of_nothing_are_refused(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(name, f"no model at {name!r}; expected a directory, a file", "gpt2-xl", error=FileNotFoundError)


def test_hub_names_go_to_the_hub(monkeypatch, good, good_tensors):
    asked = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_bits(load_pretrained("gpt2-large", revision="abc")[1], good_tensors)
    assert same_bits(GPTModel.from_pretrained("owner/name").state_dict(), GPTModel.from_pretrained(good).state_dict())
    assert asked == [("openai-community/gpt2-large", "abc"), ("owner/name", None)]


@pytest.mark.parametrize("allowed", [True, False])
def test_pickles_are_fetched_only_where_they_may_be_opened(allowed, monkeypatch, good, good_tensors):
    asked: list[str] = []
    download = lambda repo, revision, allow_patterns: asked.extend(allow_patterns) or str(good)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_bits(load_pretrained("gpt2", allow_pickle=allowed)[1], good_tensors)
    assert any("bin" in pattern for pattern in asked) == allowed


def test_a_hub_out_of_reach_is_named(monkeypatch, refused):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("gpt2", "'gpt2' is no local path and could not be fetched from the hub: name resolution failed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("gpt2", "needs huggingface_hub: pip install 'fastgpt-triton[hub]'")


def test_a_directory_of_that_name_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ours = sharp()
    ours.save_pretrained("gpt2")
    monkeypatch.setattr(weights, "_download", lambda *args: pytest.fail("went to the hub"))
    assert same_bits(GPTModel.from_pretrained("gpt2").state_dict(), ours.state_dict())

"""Shards: ours, transformers', and indexes that lead elsewhere."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import IDS, same_bits, sharp, theirs
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints import weights
from fastgpt.checkpoints.weights import save_pretrained


def sharded(directory: Path, good: Path, weight_map: Any) -> Path:
    shutil.copy(good / "config.json", directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors", "", ".", "..", "./x.safetensors"],
)
def test_shards_outside_the_directory_are_refused(name, tmp_path, good, refused):
    name = str(tmp_path / "outside.safetensors") if name.startswith("/") else name
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside", directory / "sub" / "inside", directory / "x"):
        shutil.copy(good / "model.safetensors", place.with_suffix(".safetensors"))
    names = dict.fromkeys(load_file(good / "model.safetensors"), name)
    refused(sharded(directory, good, names), f"names a shard outside its own directory: {name!r}")


@pytest.mark.parametrize(
    "weight_map", [None, [], 3, "model.safetensors", {"wte.weight": 3}, {"wte.weight": None}], ids=str
)
def test_indexes_without_a_map_of_names_are_refused(weight_map, tmp_path, good, refused):
    refused(sharded(tmp_path, good, weight_map), "has no weight_map of file names")


def test_broken_indexes_and_shards_are_refused(tmp_path, good, refused):
    refused(sharded(tmp_path, good, {}), "there are none")
    refused(
        sharded(tmp_path, good, {"a": "model-1.safetensors"}),
        "names the shard 'model-1.safetensors', which isn't there",
    )
    (tmp_path / "model-1.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-1])
    refused(tmp_path, "model-1.safetensors", "not a whole safetensors file")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, "model.safetensors.index.json is not JSON")


def test_a_shard_left_out_is_a_list_of_what_is_missing(tmp_path, refused):
    theirs().save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    lost = [name for name, shard in content["weight_map"].items() if shard == last]
    content["weight_map"] = {name: shard for name, shard in content["weight_map"].items() if shard != last}
    index.write_text(json.dumps(content))
    refused(tmp_path, f"in {len(lost)} places", *(f"missing {name} " for name in lost))


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"norm_position": "post"}], ids=str)
def test_shards_that_we_wrote(changes, tmp_path):
    ours = sharp(**changes)
    ours.save_pretrained(tmp_path, max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    contents = [load_file(tmp_path / shard) for shard in shards]
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in contents]
    assert all(size <= 20_000 for size in sizes)
    assert all(left + right > 20_000 for left, right in itertools.pairwise(sizes))  # none is needless
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: s for s, content in zip(shards, contents, strict=True) for n in content}
    loaded = GPTModel.from_pretrained(tmp_path)
    assert loaded.config == ours.config
    assert same_bits(loaded.state_dict(), ours.state_dict())
    if "norm_position" not in changes:
        with torch.no_grad():
            logits = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(IDS).logits
        torch.testing.assert_close(logits, ours(IDS), rtol=1e-5, atol=2e-5)


def test_a_shard_of_one_large_tensor_and_a_model_that_needs_no_shards(tmp_path):
    ours = sharp()
    save_pretrained(ours.config, ours.state_dict(), tmp_path / "one", max_shard_bytes=1)
    assert len(list((tmp_path / "one").glob("model-*"))) == len(load_file_names(tmp_path / "one"))
    assert same_bits(GPTModel.from_pretrained(tmp_path / "one").state_dict(), ours.state_dict())
    save_pretrained(ours.config, ours.state_dict(), tmp_path / "all", max_shard_bytes=10**9)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"model.safetensors", "config.json"}
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        save_pretrained(ours.config, ours.state_dict(), tmp_path / "none", max_shard_bytes=0)
    assert not (tmp_path / "none").exists()


def load_file_names(directory: Path) -> list[str]:
    return [name for path in directory.glob("*.safetensors") for name in load_file(path)]


def test_saves_over_one_another_leave_nothing_behind(tmp_path):
    for seed, limit in enumerate([None, 20_000, 50_000, 20_000, None]):
        ours = sharp(seed=seed)
        save_pretrained(ours.config, ours.state_dict(), tmp_path, max_shard_bytes=limit)
        assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), ours.state_dict())
        names = load_file_names(tmp_path)
        assert len(names) == len(set(names)) == 29
        assert (tmp_path / "model.safetensors.index.json").exists() == (limit is not None)


def test_a_tensor_in_two_shards_is_refused(tmp_path, good, refused):
    tensors = load_file(good / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] + 1 for name in names[18:]}, tmp_path / "model-2.safetensors")
    weight_map = {name: f"model-{1 + (i >= 20)}.safetensors" for i, name in enumerate(names)}
    said = refused(sharded(tmp_path, good, weight_map), "tensors are in two shards")
    for name in names[18:20]:
        assert f"{name} is in model-1.safetensors and in model-2.safetensors" in said


def test_shards_of_two_saves_are_refused(tmp_path, refused):
    for seed in (0, 1):
        ours = sharp(seed=seed)
        save_pretrained(ours.config, ours.state_dict(), tmp_path / str(seed), max_shard_bytes=40_000)
    shard = "model-00002-of-00004.safetensors"
    assert (tmp_path / "0" / shard).is_file()
    shutil.copy(tmp_path / "1" / shard, tmp_path / "0" / shard)
    refused(tmp_path / "0", "shards of different saves", shard)


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize(
    "changes",
    [{"n_heads": 8}, {"activation": "relu"}, {"norm_eps": 0.5}, {"norm_position": "post"}],
    ids=str,
)
def test_a_save_that_was_interrupted_loads_as_the_old_model_or_not_at_all(
    changes, limit, tmp_path, monkeypatch, refused
):
    """The weights are in place, config.json is still the old one, and both have the same shapes."""
    sharp().save_pretrained(tmp_path)
    new = sharp(seed=1, **changes)

    def interrupted(path: Any, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(new.config, new.state_dict(), tmp_path, max_shard_bytes=limit)
    monkeypatch.undo()
    (name, value), *_ = changes.items()
    old = getattr(sharp().config, name)
    refused(tmp_path, "of different saves", f"{name}={old!r}, the weights {value!r}")

"""Two gloo processes against one: the same losses, stopped and resumed across numbers of processes and engines."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_runs import HALF, STEPS, TOKENS, packed, train
from models import tiny_model

from fastgpt import GPTModel
from fastgpt.text.data import TokenStream
from fastgpt.training import checkpoint
from fastgpt.training.checkpoint import CheckpointError
from fastgpt.training.distributed import World, launched
from fastgpt.training.settings import TrainSettings

ROOT = Path(__file__).parent.parent.parent
Runs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The directory that distributed_runs.py filled."""
    root = tmp_path_factory.mktemp("runs")
    paths = (ROOT, ROOT / "kernels", ROOT / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "distributed_runs.py"), str(root)],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
    )
    errors = [path.read_text() for path in sorted(root.glob("*.error"))]
    assert done.returncode == 0, "\n".join([done.stderr, *errors])
    return root


@pytest.fixture(scope="module")
def runs(root) -> Runs:
    return {path.stem: json.loads(path.read_text()) for path in root.glob("*.json")}


def numbers(run: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in run["log"] if key in entry]


ENGINES = pytest.mark.parametrize("engine", ["ddp", "fsdp"])


def close(runs: Runs, name: str, to: str, rel: float = 1e-5) -> None:
    """Losses, norms before clipping and the validation loss of one run are those of another."""
    for key, count in (("loss", STEPS), ("grad_norm", STEPS), ("validation_loss", 1)):
        expected = numbers(runs[to], key)
        assert len(expected) == count
        assert numbers(runs[name], key) == pytest.approx(expected, rel=rel)


@ENGINES
def test_two_processes_train_as_one_with_the_whole_batch(runs, engine):
    close(runs, engine, "one")
    assert max(numbers(runs["one"], "grad_norm")) > 0.5  # it was clipped
    assert runs[engine]["tied"]
    assert numbers(runs[engine], "sample") == numbers(runs["one"], "sample")


@ENGINES
def test_rows_of_unequal_lengths_count_by_their_targets(runs, engine):
    """Documents apart, two micro-batches, recomputed blocks: every target of the step counts the same."""
    close(runs, f"{engine} mixed", "one mixed")
    assert numbers(runs["one mixed"], "loss") != pytest.approx(numbers(runs["one"], "loss"), rel=1e-3)


def test_the_loss_of_unequal_rows_is_the_mean_over_all_targets(runs):
    model = tiny_model(tie_weights=True)
    inputs, targets, starts = packed(0).batch(0)
    logits = model(inputs, starts=starts).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert len((targets != -100).sum(dim=1).unique()) > 1
    expected = losses[targets != -100].double().mean().item()
    assert numbers(runs["one mixed"], "loss")[0] == pytest.approx(expected, rel=1e-6)


@ENGINES
def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs, engine):
    stopped = runs[f"{engine} stopped"]
    assert stopped["stopped"] == signal.SIGTERM
    assert HALF <= stopped["step"] <= HALF + 1


@pytest.mark.parametrize("name", ["one to ddp", "one to fsdp", "ddp to one", "fsdp to one", "ddp to fsdp"])
def test_a_run_goes_on_with_another_number_of_processes_or_engine(runs, name):
    close(runs, name, "one")


def test_shards_hold_all_weights_and_export_to_one_file(root, runs):
    names = [path.name for path in (root / "fsdp-stopped").rglob("*.distcp")]
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names)
    weights = {}
    for name in ("one", "fsdp", "ddp"):
        weights[name] = GPTModel.from_pretrained(root / name).state_dict()
        assert len(list((root / name).glob("*.safetensors"))) == 1
    for name in ("fsdp", "ddp"):
        assert weights[name].keys() == weights["one"].keys()
        for key, tensor in weights[name].items():
            if not key.endswith("W_key.bias"):  # its gradient is zero but for rounding, which Adam blows up
                torch.testing.assert_close(tensor, weights["one"][key], rtol=1e-3, atol=1e-4)


def test_dropout_differs_between_ranks_and_is_resumed_exactly(runs):
    assert numbers(runs["fsdp wet resumed"], "loss") == numbers(runs["fsdp wet"], "loss")
    assert numbers(runs["fsdp wet"], "loss") != pytest.approx(numbers(runs["fsdp"], "loss"), rel=1e-3)


def test_sixteen_bit_parameters_with_wide_copies(runs):
    for name in ("one half", "fsdp half", "one half to fsdp"):
        assert numbers(runs[name], "loss") == pytest.approx(numbers(runs["one"], "loss"), rel=0.03)
        assert numbers(runs[name], "loss") != pytest.approx(numbers(runs["one"], "loss"), rel=1e-6)


def test_pure_bfloat16_over_ddp_is_refused(tmp_path):
    world = World(0, 2)
    with pytest.raises(ValueError, match="pure-bfloat16 on several processes needs --parallel fsdp"):
        train(tmp_path, world, 0.0, None, False, dtype="pure-bfloat16")
    with pytest.raises(ValueError, match="multiple of processes x accumulate, got 4 rows for 2 x 4"):
        train(tmp_path, world, 0.0, None, False, accumulate=4)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


def test_a_shard_that_was_cut_off_and_metadata_with_code_in_it_are_refused(root, tmp_path):
    shutil.copytree(root / "fsdp-stopped", tmp_path / "run")
    newest = checkpoint.place(tmp_path / "run", checkpoint.steps(tmp_path / "run")[-1])
    shard, metadata = newest / "__1_0.distcp", newest / ".metadata"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint: __1_0\.distcp has"):
        train(tmp_path / "run", World(), 0.0, None, False)
    shard.write_bytes(whole)
    evil = pickle.dumps(Touch(tmp_path / "executed"))
    metadata.write_bytes(evil)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][".metadata"] = [len(evil), zlib.crc32(evil)]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"its metadata names .*open, which has no business there"):
        train(tmp_path / "run", World(), 0.0, None, False)
    assert not (tmp_path / "executed").exists()


def test_the_format_is_torchs_own(root):
    """Other programs can read the shards: torch.distributed.checkpoint alone gives the tensors."""
    directory = checkpoint.place(root / "fsdp", STEPS)
    place = {"model.final_norm.scale": torch.zeros(32), "exp_avg.tok_emb.weight": torch.zeros(101, 32)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(place, storage_reader=dcp.FileSystemReader(directory))
    assert torch.equal(place["model.final_norm.scale"], GPTModel.from_pretrained(root / "fsdp").final_norm.scale)
    assert place["exp_avg.tok_emb.weight"].abs().sum() > 0


def test_without_torchrun_there_is_one_process():
    with launched(torch.device("cpu")) as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)


def test_ranks_get_shares_that_make_the_batch():
    stream = TokenStream(TOKENS, 16, 6, 3)
    whole = stream.batch(5)
    for size in (1, 2, 3):
        rows = 6 // size
        parts = [stream.rows(5, rank * rows, (rank + 1) * rows) for rank in range(size)]
        for i in (0, 1):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_the_default_engine_is_named_in_the_settings():
    with pytest.raises(ValueError, match=re.escape("parallel must be one of ddp, fsdp, got 'zero'")):
        TrainSettings(parallel="zero")

"""`fastgpt convert`: every format to every other and back bit for bit, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face, rows
from foreign_files import read_llmc, write_openai
from models import tiny_model
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints.weights import load, save_as
from fastgpt.cli import main


def run(source: Path | str, destination: Path, to: str, *flags: str) -> int:
    return main(["convert", str(source), str(destination), "--to", to, *flags])


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fails(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: Any) -> str:
    """Status 2, one message, and nothing under `directory` changed."""
    before = tree(directory)
    assert run(*arguments) == 2
    assert tree(directory) == before
    return capsys.readouterr().err


def assert_same_logits(said: str) -> None:
    """The command found the same logits but for roundings: a padded vocabulary is a product of another shape."""
    assert "read back: weights bit for bit, logits" in said
    if "identical (difference 0)" not in said:
        difference, largest = re.search(r"differ by up to (\S+) \(the largest is (\S+)\)", said).groups()
        assert float(difference) < 1e-5 * float(largest)


FLAGS = {"hf": [], "pickle": ["--pickle"], "shards": ["--max-shard-bytes", "20000"]}
# What a chain of formats can all say, beside the model that is tied.
CHAINS = [
    (["hf", "llmc", "llms-from-scratch", "pickle", "llmc", "shards", "hf"], {}),
    (["llms-from-scratch", "hf", "llms-from-scratch"], {"tie_weights": False, "qkv_bias": False}),
    (["nanogpt", "hf", "nanogpt", "pickle", "nanogpt"], {"activation": "gelu"}),
    (["nanogpt", "shards", "nanogpt"], {"activation": "gelu", "bias": False, "qkv_bias": False}),
    (["pickle", "shards", "hf"], {"tie_weights": False, "norm_eps": 0.01, "activation": "relu"}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("chain", "changes"), CHAINS, ids=[" ".join(chain) for chain, _ in CHAINS])
def test_round_trips_change_no_bit(chain, changes, dtype, tmp_path, capsys):
    model = tiny_model(**{"tie_weights": True, **changes})
    source = tmp_path / "start"
    model.save_pretrained(source, dtype=getattr(torch, dtype))
    start = load(source).tensors
    for i, step in enumerate(chain):
        target = tmp_path / f"{i}-{step}"
        to, flags = ("hf", FLAGS[step]) if step in FLAGS else (step, [])
        assert run(source, target, to, "--allow-pickle", *flags) == 0
        assert_same_logits(capsys.readouterr().out)
        source = target
    loaded = load(source, allow_pickle=True)
    extra = {name: loaded.tensors[name] for name in set(loaded.tensors) - set(start)}
    assert bits({name: loaded.tensors[name] for name in start}) == bits(start)
    assert not any(tensor.any() for tensor in extra.values())
    wide = {name: tensor.float() for name, tensor in start.items()}
    with torch.no_grad():
        expected = tiny_model(**{"tie_weights": True, **changes})
        missing, unexpected = expected.load_state_dict(wide, strict=False)
        assert set(missing) <= {"out_head.weight"}
        assert not unexpected
        close(GPTModel.from_pretrained(source, allow_pickle=True)(IDS), expected(IDS))


@torch.no_grad()
def test_what_is_written_for_transformers_is_read_by_it(tmp_path, capsys):
    theirs = hugging_face()
    write_openai(tmp_path / "124M", theirs, global_step=torch.tensor(3))
    assert run(tmp_path / "124M", tmp_path / "hf", "hf", "--max-shard-bytes", "30000") == 0
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bits(dict(model.transformer.state_dict())) == bits(dict(theirs.transformer.state_dict()))
    close(model.eval()(IDS).logits, theirs(IDS).logits)
    out = capsys.readouterr().out
    assert "(openai) ->" in out
    assert "left behind: global_step" in out


def test_a_dtype_that_holds_less_is_said_with_its_difference(tmp_path, capsys):
    model = tiny_model(tie_weights=True)
    model.save_pretrained(tmp_path / "a")
    assert run(tmp_path / "a", tmp_path / "b.bin", "llmc", "--dtype", "bfloat16") == 0
    header, arrays = read_llmc(tmp_path / "b.bin")
    assert header[1] == 5
    expected = model.tok_emb.weight.detach().bfloat16().float().numpy()
    assert (arrays["wte.weight"][:101] == expected).all()
    out = capsys.readouterr().out
    said = float(out.split("differ by up to ")[1].split()[0])
    with torch.no_grad():
        difference = (GPTModel.from_pretrained(tmp_path / "b.bin")(IDS) - model(IDS)).abs().max()
    assert said > 0
    assert 0.2 < said / float(difference) < 5  # on other ids
    assert "parameters in bfloat16" in out
    assert run(tmp_path / "b.bin", tmp_path / "c", "hf", "--dtype", "float64") == 0
    assert_same_logits(capsys.readouterr().out)


def test_the_books_copy_of_gpt2_is_tied_again(tmp_path, capsys):
    tied = tiny_model(tie_weights=True)
    save_as(tied.config, tied.state_dict(), tmp_path / "book", "llms-from-scratch")
    assert run(tmp_path / "book", tmp_path / "m.bin", "llmc", "--allow-pickle") == 0
    assert "tie_weights: False -> True" in capsys.readouterr().out
    assert bits(load(tmp_path / "m.bin").tensors) == bits(rows(tied))


def test_what_would_be_lost_is_refused_unless_it_is_dropped(tmp_path, capsys):
    model = tiny_model(norm_eps=0.01, head_bias=True)
    model.save_pretrained(tmp_path / "a")
    said = fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "nanogpt")
    for line in (
        "tie_weights=False, not True: --drop head gives it up",
        "head_bias=True, not False: --drop head_bias gives it up",
        "activation='gelu_tanh', not 'gelu': --drop activation gives it up",
        "norm_eps=0.01, not 1e-05: --drop norm_eps gives it up",
    ):
        assert line in said
    said = fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "nanogpt", "--drop", "head", "activation")
    assert "head_bias" in said
    assert "--drop head gives" not in said
    words = ("head", "head_bias", "activation", "norm_eps")
    assert run(tmp_path / "a", tmp_path / "b", "nanogpt", "--drop", *words) == 0
    out = capsys.readouterr().out
    assert "tie_weights: False -> True" in out
    assert "activation: 'gelu_tanh' -> 'gelu'" in out
    assert "logits differ by up to" in out
    loaded = load(tmp_path / "b", allow_pickle=True)
    kept = {name: tensor for name, tensor in rows(model).items() if "out_head" not in name}
    assert bits(loaded.tensors) == bits(kept)
    said = fails(capsys, tmp_path, tmp_path / "b", tmp_path / "c", "nanogpt", "--allow-pickle", "--drop", "head")
    assert "--drop head: format 'nanogpt' loses no such thing" in said


@pytest.mark.parametrize("changes", [{"norm_position": "post"}, {"causal": False}], ids=str)
def test_another_function_is_refused_whatever_is_dropped(changes, tmp_path, capsys):
    tiny_model(**changes).save_pretrained(tmp_path / "a")
    (name, _), *_ = changes.items()
    for to in ("hf", "nanogpt", "llms-from-scratch", "llmc"):
        assert f"{name}=" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", to)


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    model, other = tiny_model(tie_weights=True), tiny_model(1, tie_weights=True)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "file").write_text("x")
    assert "exists; --force replaces it" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "hf")
    assert "exists; --force" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "file", "llmc")
    said = fails(capsys, tmp_path, tmp_path / "a", tmp_path / "file", "hf", "--force")
    assert "hf is written as a directory" in said
    assert "llmc is written as a file" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "llmc", "--force")
    assert run(tmp_path / "a", tmp_path / "b", "hf", "--force", "--max-shard-bytes", "60000") == 0
    assert bits(load(tmp_path / "b").tensors) == bits(rows(model))
    names = {path.name for path in (tmp_path / "b").iterdir() if not path.name.startswith("model-")}
    assert names == {"tokenizer.json", "config.json", "model.safetensors.index.json"}
    assert run(tmp_path / "a", tmp_path / "file", "llmc", "--force") == 0
    assert bits(load(tmp_path / "file").tensors) == bits(rows(model))
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "a", tmp_path / "empty", "hf") == 0
    assert run(tmp_path / "a", tmp_path / "a", "hf", "--force", "--dtype", "float64") == 0
    assert load(tmp_path / "a").tensors["tok_emb.weight"].dtype == torch.float64
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(value, tmp_path, capsys):
    model = tiny_model(tie_weights=True)
    with torch.no_grad():
        model.trf_blocks[1].ff.layers[0].weight[3, :2] = value
        model.final_norm.shift[5] = value
    model.save_pretrained(tmp_path / "a")
    said = fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "llmc")
    assert "trf_blocks.1.ff.layers.0.weight: 2 of 4,096" in said
    assert "final_norm.shift: 1 of 32" in said
    assert run(tmp_path / "a", tmp_path / "b", "llmc", "--allow-nonfinite") == 0
    assert_same_logits(capsys.readouterr().out)
    assert bits(load(tmp_path / "b").tensors) == bits(rows(model))


def test_the_vocabulary_may_be_cut(tmp_path, capsys):
    model = tiny_model(tie_weights=True, activation="gelu")
    save_as(model.config, model.state_dict(), tmp_path / "a", "nanogpt")
    assert run(tmp_path / "a", tmp_path / "b", "hf", "--allow-pickle", "--vocab-size", "90") == 0
    assert "vocab_size: 101 -> 90" in capsys.readouterr().out
    cut = GPTModel.from_pretrained(tmp_path / "b")
    ids = IDS % 90
    with torch.no_grad():
        close(cut(ids), model(ids)[..., :90])
    for size in ("0", "102"):
        said = fails(capsys, tmp_path, tmp_path / "b", tmp_path / "c", "hf", "--vocab-size", size)
        assert f"--vocab-size must be from 1 to the model's 90, got {size}" in said


def test_pickles_need_the_flag(tmp_path, capsys):
    model = tiny_model(tie_weights=True, activation="gelu")
    save_as(model.config, model.state_dict(), tmp_path / "a", "nanogpt")
    assert "--allow-pickle" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "hf")
    assert run(tmp_path / "a", tmp_path / "b", "hf", "--allow-pickle") == 0
    assert "left behind: iter_num, best_val_loss, config" in capsys.readouterr().out
    assert load(tmp_path / "b").config == model.config


@pytest.mark.parametrize("sabotage", ["a weight", "the config", "a bias"])
def test_a_result_that_is_wrong_is_not_kept(sabotage, tmp_path, capsys, monkeypatch):
    tiny_model(tie_weights=True, qkv_bias=False).save_pretrained(tmp_path / "a")

    def wrong(config: Any, tensors: dict[str, torch.Tensor], path: Path, *args: Any, **kwargs: Any) -> None:
        name = "trf_blocks.1.att.out_proj.weight"
        if sabotage == "a weight":
            tensors = tensors | {name: tensors[name].T}
        elif sabotage == "the config":
            config = config.replace(n_heads=8)
        else:
            config = config.replace(qkv_bias=True)
            tensors = tensors | {f"trf_blocks.{i}.att.W_{n}.bias": torch.ones(32) for i in (0, 1) for n in
                                 ("query", "key", "value")}  # fmt: skip
        save_as(config, tensors, path, *args, **kwargs)

    monkeypatch.setattr("fastgpt.checkpoints.weights.save_as", wrong)
    said = fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", "hf")
    wanted = "bit for bit, but logits differ by up to" if sabotage == "the config" else "weights did not come back"
    assert wanted in said


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    tiny_model(tie_weights=True).save_pretrained(tmp_path / "a")

    def full(*args: Any, **kwargs: Any) -> None:
        save_as(*args, **kwargs)
        raise OSError("No space left on device")

    monkeypatch.setattr("fastgpt.checkpoints.weights.save_as", full)
    for to in ("hf", "llmc"):
        assert "No space left on device" in fails(capsys, tmp_path, tmp_path / "a", tmp_path / "b", to)


def test_the_bundled_model_converts(tmp_path, capsys):
    assert run("bundled", tmp_path / "b", "llms-from-scratch") == 0
    assert_same_logits(capsys.readouterr().out)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["n_layers"] == config["fastgpt"]["n_layers"] == 8

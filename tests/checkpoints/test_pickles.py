"""nanoGPT's, the book's and torch.save's files: the same model out of each, and pickles that mean harm."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face, rows
from models import spread, tiny_model
from nanogpt_oracle import NanoGPT
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints.weights import CheckpointError, load, load_pretrained, save_as


@pytest.fixture
def refused(refused) -> Callable[..., str]:
    return functools.partial(refused, allow_pickle=True)


def nanogpt(bias: bool = True, vocab: int = 101) -> NanoGPT:
    torch.manual_seed(4)
    model = NanoGPT(vocab, 16, 32, 4, 2, bias).eval()
    spread(model)
    return model


def nanogpt_logits(model: NanoGPT) -> torch.Tensor:
    out = model(IDS)
    return out[0] if isinstance(out, tuple) else out


def nanogpt_state(model: NanoGPT) -> dict[str, torch.Tensor]:
    """Under nanoGPT's names, where the oracle leaves `transformer.` out too."""
    state = model.state_dict()
    return {n if n.startswith(("transformer.", "lm_head")) else f"transformer.{n}": t for n, t in state.items()}


def nanogpt_file(path: Path, trained: NanoGPT, bias: bool, prefix: str = "", vocab: int = 101, **more: Any) -> Path:
    """As nanoGPT's train.py saves it, optimizer and all."""
    optimizer = torch.optim.AdamW(trained.parameters())
    sum(p.sum() for p in trained.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    args = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 16,
        "bias": bias,
        "vocab_size": vocab,
        "dropout": 0.1,
    }
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in nanogpt_state(trained).items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 3,
        "best_val_loss": torch.tensor(4.25),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    torch.save(checkpoint | more, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoints(bias, prefix, tmp_path):
    with torch.enable_grad():
        theirs = nanogpt(bias)
        path = nanogpt_file(tmp_path / "ckpt.pt", theirs, bias, prefix)
    for source in (path, tmp_path):
        ours = GPTModel.from_pretrained(source, allow_pickle=True)
        close(ours(IDS), nanogpt_logits(theirs))
    config = ours.config
    assert (config.activation, config.tie_weights, config.bias, config.qkv_bias) == ("gelu", True, bias, bias)
    assert config.drop_rate == 0.1
    loaded = load(path, allow_pickle=True)
    assert set(loaded.beside) == {"optimizer", "iter_num", "best_val_loss", "config"}
    assert loaded.layout == "nanogpt"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"bias": False, "qkv_bias": False}, {"qkv_bias": False}], ids=str)
def test_nanogpt_reads_our_checkpoints(changes, tmp_path):
    ours = tiny_model(tie_weights=True, activation="gelu", **changes)
    save_as(ours.config, ours.state_dict(), tmp_path, "nanogpt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    args = checkpoint["model_args"]
    bias = changes != {"bias": False, "qkv_bias": False}
    assert args == {
        **{"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 101, "dropout": 0.0},
        "bias": bias,
    }
    theirs = nanogpt(args["bias"])
    wanted = nanogpt_state(theirs)
    assert set(checkpoint["model"]) == set(wanted)
    bare = "transformer.wte.weight" not in theirs.state_dict()
    theirs.load_state_dict({n.removeprefix("transformer.") if bare else n: t for n, t in checkpoint["model"].items()})
    close(nanogpt_logits(theirs), ours(IDS))
    tied = checkpoint["model"]["lm_head.weight"], checkpoint["model"]["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    loaded = load(tmp_path, allow_pickle=True)
    assert loaded.config == ours.config
    assert bits(loaded.tensors) == bits(rows(ours))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_args": [1]}, "model_args must be a dict, got list"),
        ({"model_args": {"n_layer": 2}}, "model_args lacks"),
        ({"model_args": {"n_layer": 2, "rope": True}}, "model_args has unknown keys ['rope']"),
        ({"fastgpt": 3}, '"fastgpt" in the checkpoint must be an object, got 3'),
        ({"fastgpt": tiny_model().config.to_dict() | {"n_heads": 8}}, 'its "fastgpt" has n_heads=8, the weights 4'),
    ],
    ids=str,
)
def test_bad_nanogpt_checkpoints_are_refused(more, message, tmp_path, refused):
    refused(nanogpt_file(tmp_path / "ckpt.pt", nanogpt(), True, **more), message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", 2**40), ("n_embd", 2**16), ("n_layer", 1024), ("bias", "yes"), ("block_size", 2**20)],
)
def test_model_args_that_ask_for_a_terabyte_allocate_nothing(name, value, tmp_path, refused):
    path = nanogpt_file(tmp_path / "ckpt.pt", nanogpt(), True)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["model_args"][name] = value
    torch.save(checkpoint, path)
    refused(path)


def test_a_head_that_was_untied_is_not_dropped(tmp_path, refused):
    model = nanogpt()
    state = nanogpt_state(model) | {"lm_head.weight": torch.ones(101, 32)}
    refused(nanogpt_file(tmp_path / "ckpt.pt", model, True, model=state), "the head differs from the token embed")


@torch.no_grad()
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_pytorch_model_bin(prefix, zipped, tmp_path):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name.replace("transformer.", prefix): t for name, t in theirs.state_dict().items() if name[:2] != "lm"}
    state[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    close(GPTModel.from_pretrained(tmp_path, allow_pickle=True)(IDS), theirs(IDS).logits)
    with pytest.raises(CheckpointError, match="opened only with allow_pickle=True"):
        GPTModel.from_pretrained(tmp_path)


@torch.no_grad()
def test_shards_of_pytorch_model_bin(tmp_path, refused):
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: names["h.1" in name] for name in state}
    for shard in names:
        torch.save({name: state[name] for name in state if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    close(GPTModel.from_pretrained(tmp_path, allow_pickle=True)(IDS), theirs(IDS).logits)
    torch.save({name: state[name] for name in state if "wpe" in name or "h.1" in name}, tmp_path / names[1])
    refused(tmp_path, "tensors are in two shards", "transformer.wpe.weight")


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_our_pytorch_model_bin(tied, tmp_path):
    ours = tiny_model(tie_weights=tied, qkv_bias=False)
    save_as(ours.config, ours.state_dict(), tmp_path, "hf", pickled=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    close(theirs(IDS).logits, ours(IDS))
    assert bits(load_pretrained(tmp_path, allow_pickle=True)[1]) == bits(rows(ours))


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTModel", "GPTModelFast"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_books_files(wrapped, name, tmp_path):
    book = pytest.importorskip("llms_from_scratch.ch04", reason="needs llms_from_scratch")
    cfg = {"vocab_size": 101, "context_length": 16, "emb_dim": 128, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
    cfg["qkv_bias"] = False
    theirs = getattr(book, name)(cfg).eval()
    spread(theirs)
    state = theirs.state_dict()
    path = tmp_path / "model_and_optimizer.pth"
    torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {}}} if wrapped else state, path)
    alone = GPTModel.from_pretrained(path, allow_pickle=True)  # heads are 64 wide
    close(alone(IDS), theirs(IDS))
    (tmp_path / "config.json").write_text(json.dumps(cfg | {"n_heads": 4, "kv_window_size": 8}))
    narrow = GPTModel.from_pretrained(path, allow_pickle=True)
    four = getattr(book, name)(cfg | {"n_heads": 4}).eval()
    four.load_state_dict(state)
    close(narrow(IDS), four(IDS))
    assert load(path, allow_pickle=True).beside == (("optimizer_state_dict",) if wrapped else ())


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"tie_weights": True}, {"qkv_bias": False}, {"bias": False}], ids=str)
def test_the_book_reads_our_files(changes, tmp_path):
    book = pytest.importorskip("llms_from_scratch.ch04", reason="needs llms_from_scratch")
    ours = tiny_model(**changes)
    save_as(ours.config, ours.state_dict(), tmp_path, "llms-from-scratch")
    theirs = book.GPTModel(json.loads((tmp_path / "config.json").read_text())).eval()
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    close(theirs(IDS), ours(IDS))
    assert torch.equal(GPTModel.from_pretrained(tmp_path, allow_pickle=True)(IDS), ours(IDS))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False, None])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "model.pth"])
def test_code_in_a_pickle_is_not_executed(name, zipped, tmp_path, refused):
    state = dict(hugging_face().state_dict())
    content = {"model": state | {"x": Touch(tmp_path / "executed")}, "model_args": {"n_layer": 2}}
    if zipped is None:
        (tmp_path / name).write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    else:
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "nothing in it was executed")
    refused(tmp_path / name, "nothing in it was executed")
    refused(tmp_path / name, "opened only with allow_pickle=True", allow_pickle=False)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds list, expected a dict of tensors"),
        (torch.ones(3), "holds Tensor, expected a dict of tensors"),
        ({"wte.weight": 3}, "'wte.weight' is int, expected a tensor"),
        ({3: torch.ones(3)}, "3 is Tensor, expected a tensor on the CPU by its name"),
        ({"wte.weight": torch.ones(3).to_sparse()}, "is no state dict"),
        ({"wte.weight": torch.ones(3, device="meta")}, "is no state dict"),
        ({"a": torch.ones(3)}, "not those of a GPT-2 that is known here: a"),
        ({}, "there are none"),
    ],
    ids=range(8),
)
def test_pickles_of_something_else_are_refused(content, message, tmp_path, refused):
    torch.save(content, tmp_path / "model.pth")
    refused(tmp_path, message)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_pickles_are_refused(zipped, tmp_path, refused):
    path = tmp_path / "pytorch_model.bin"
    torch.save(dict(hugging_face().state_dict()), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in (0, 1, 2, 5, 300, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path)


def test_a_small_pickle_of_large_tensors_allocates_nothing(tmp_path, refused):
    """Strides of zero, one memory under many names: what torch.save stores once, and a copy would store in full."""
    state = {"tok_emb.weight": torch.ones(1, 1).expand(2**20, 2**14), "pos_emb.weight": torch.ones(16, 2**14)}
    block = {
        **{f"att.{name}.weight": (2**14, 2**14) for name in ("W_query", "W_key", "W_value", "out_proj")},
        **{"att.out_proj.bias": (2**14,), "ff.layers.0.weight": (2**16, 2**14), "ff.layers.0.bias": (2**16,)},
        **{"ff.layers.2.weight": (2**14, 2**16), "ff.layers.2.bias": (2**14,)},
        **{f"{norm}.{part}": (2**14,) for norm in ("norm1", "norm2") for part in ("scale", "shift")},
    }
    state |= {f"trf_blocks.0.{name}": torch.ones(1).expand(shape) for name, shape in block.items()}
    state |= {f"final_norm.{part}": torch.ones(2**14) for part in ("scale", "shift")}
    torch.save(state, tmp_path / "model.pth")
    refused(tmp_path, "the tensors would take 81,606,213,632 bytes", "the file has")


class Storage:
    """Pickled as torch.save pickled storages before its archives: by a number of elements that nothing checks."""


class Pickler(pickle.Pickler):
    def __init__(self, file: Any, count: int) -> None:
        super().__init__(file, 2)
        self.count = count

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", self.count, None) if isinstance(obj, Storage) else None


class Claim:
    def __init__(self, count: int) -> None:
        self.count = count

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return torch._utils._rebuild_tensor_v2, (Storage(), 0, (self.count,), (1,), False, OrderedDict())


@pytest.mark.parametrize("count", [2**28, 2**31, 2**40])
def test_an_old_pickle_that_claims_a_terabyte_is_refused(count, tmp_path, refused):
    from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"protocol_version": 1001, "little_endian": True}):
            pickle.dump(value, file, 2)
        Pickler(file, count).dump({"tok_emb.weight": Claim(count)})
        pickle.dump(["0"], file, 2)
        file.write(struct.pack("<q", count) + bytes(64))
    refused(tmp_path, "not a whole checkpoint of tensors", "RuntimeError")


def test_compressed_archives_are_refused(tmp_path, refused):
    torch.save(dict(hugging_face().state_dict()), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "b.pt", "is compressed")

"""Files of llm.c, TensorFlow, nanoGPT, the book and torch.save: the same model out of each, and none of the bad ones."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files
import numpy as np
import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face, rows
from models import spread, tiny_model
from nanogpt_oracle import NanoGPT
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints import tensorbundle
from fastgpt.checkpoints.weights import CheckpointError, load, load_pretrained, save_as


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def refused() -> Callable[..., str]:
    """Loading raises CheckpointError with these messages, at no cost in memory."""

    def check(source: Path, *messages: str, allow_pickle: bool = True) -> str:
        before = peak_bytes()
        with pytest.raises(CheckpointError) as caught:
            GPTModel.from_pretrained(source, allow_pickle=allow_pickle)
        for message in messages:
            assert message in str(caught.value)
        assert peak_bytes() - before < 300e6
        return str(caught.value)

    return check


# llm.c


@torch.no_grad()
@pytest.mark.parametrize("version", [3, 5])
def test_llmc_files_written_elsewhere(version, tmp_path):
    theirs = hugging_face()
    if version == 5:
        theirs = theirs.bfloat16().float()
    path = tmp_path / "gpt2_tiny.bin"
    foreign_files.write_llmc(path, foreign_files.gpt2_arrays(theirs, linear=True), heads=4, version=version)
    ours = GPTModel.from_pretrained(path)
    close(ours(IDS), theirs(IDS).logits)
    assert (ours.config.vocab_size, ours.config.tie_weights, ours.config.n_heads) == (101, True, 4)
    assert load(path).tensors["tok_emb.weight"].dtype == (torch.float32 if version == 3 else torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"bias": False, "qkv_bias": False}], ids=str)
def test_llmc_files_read_elsewhere(changes, dtype, tmp_path):
    ours = tiny_model(tie_weights=True, **changes).to(dtype)
    save_as(ours.config, ours.state_dict(), tmp_path / "m.bin", "llmc")
    header, arrays = foreign_files.read_llmc(tmp_path / "m.bin")
    assert header == [20240326, 3 if dtype == torch.float32 else 5, 16, 101, 2, 4, 32, 128]
    state = {name: tensor.float().numpy() for name, tensor in ours.state_dict().items()}
    assert np.array_equal(arrays["wte.weight"][:101], state["tok_emb.weight"])
    assert not arrays["wte.weight"][101:].any()
    for i in range(2):
        packed = [state[f"trf_blocks.{i}.att.W_{x}.weight"] for x in ("query", "key", "value")]
        assert np.array_equal(arrays[f"h.{i}.attn.c_attn.weight"], np.concatenate(packed))
        assert np.array_equal(arrays[f"h.{i}.attn.c_proj.weight"], state[f"trf_blocks.{i}.att.out_proj.weight"])
        assert np.array_equal(arrays[f"h.{i}.mlp.c_proj.weight"], state[f"trf_blocks.{i}.ff.layers.2.weight"])
        bias = state.get(f"trf_blocks.{i}.ff.layers.0.bias", np.zeros(128))
        assert np.array_equal(arrays[f"h.{i}.mlp.c_fc.bias"], bias)
    assert np.array_equal(arrays["ln_f.weight"], state["final_norm.scale"])
    back = load(tmp_path / "m.bin").tensors
    kept = rows(ours)
    assert bits({name: back[name] for name in kept}) == bits(kept)
    assert not any(back[name].any() for name in back if name not in kept)


@pytest.mark.parametrize(("vocab", "table"), [(128, 128), (130, 256)])
def test_llmc_pads_the_vocabulary_to_a_multiple_of_128(vocab, table, tmp_path):
    ours = tiny_model(tie_weights=True, vocab_size=vocab, vocab_multiple=64)
    save_as(ours.config, ours.state_dict(), tmp_path / "m.bin", "llmc")
    header, arrays = foreign_files.read_llmc(tmp_path / "m.bin")
    assert (header[3], header[7]) == (vocab, table)
    assert arrays["wte.weight"].shape == (table, 32)
    assert not arrays["wte.weight"][vocab:].any()
    assert bits(load(tmp_path / "m.bin").tensors) == bits(rows(ours))


def test_llmc_holds_fp32_or_bf16_of_one_kind(tmp_path):
    ours = tiny_model(tie_weights=True)
    with pytest.raises(ValueError, match=r"float32 or bfloat16 weights, got \['torch\.float16'\]"):
        save_as(ours.config, ours.state_dict(), tmp_path / "m.bin", "llmc", dtype=torch.float16)
    mixed = ours.state_dict() | {"final_norm.scale": ours.final_norm.scale.bfloat16()}
    with pytest.raises(ValueError, match=r"got \['torch\.bfloat16', 'torch\.float32'\]"):
        save_as(ours.config, mixed, tmp_path / "m.bin", "llmc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 1, "version 1; 3 (fp32) and 5 (bf16) load"),
        (1, 5, "by its header it should have"),
        (2, 0, "context_length must be from 1"),
        (2, -5, "context_length must be from 1"),
        (3, 2**31 - 1, "vocab_size must be from 1"),
        (4, 1024, "by its header it should have"),
        (4, 2**31 - 1, "n_layers must be from 1"),
        (5, 5, "emb_dim must be divisible by n_heads"),
        (6, 65536, "by its header it should have"),
        (7, 100, "a vocabulary of 101, and 100 rows"),
        (7, 2**31 - 1, "a vocabulary of 101, and 2147483647 rows"),
        (7, 256, "by its header it should have"),
    ],
)
def test_bad_llmc_headers_are_refused(place, value, message, tmp_path, refused):
    ours = tiny_model(tie_weights=True)
    save_as(ours.config, ours.state_dict(), tmp_path / "m.bin", "llmc")
    data = bytearray((tmp_path / "m.bin").read_bytes())
    struct.pack_into("<i", data, 4 * place, value)
    (tmp_path / "m.bin").write_bytes(data)
    refused(tmp_path / "m.bin", message)


def test_cut_llmc_files_are_refused(tmp_path, refused):
    ours = tiny_model(tie_weights=True)
    save_as(ours.config, ours.state_dict(), tmp_path / "m.bin", "llmc")
    data = (tmp_path / "m.bin").read_bytes()
    for size in (3, 4, 100, 1023, 1024, 5000, len(data) - 1):
        (tmp_path / "m.bin").write_bytes(data[:size])
        refused(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(data + b"\0")
    refused(tmp_path / "m.bin", "by its header it should have")


# TensorFlow


@torch.no_grad()
@pytest.mark.parametrize("how", ["directory", "index", "prefix", "no hparams"])
def test_openais_checkpoints(how, tmp_path):
    theirs = hugging_face() if how != "no hparams" else hugging_face(n_embd=128, n_head=2)
    more = {"model__wte__Adam": torch.ones(101, 32), "global_step": torch.tensor(7)}
    foreign_files.write_openai(tmp_path, theirs, **more)
    source = {"index": tmp_path / "model.ckpt.index", "prefix": tmp_path / "model.ckpt"}.get(how, tmp_path)
    if how == "no hparams":
        (tmp_path / "hparams.json").unlink()
    ours = GPTModel.from_pretrained(source)
    close(ours(IDS), theirs(IDS).logits)
    assert ours.config.tie_weights
    assert set(load(source).beside) == {"model/wte/Adam", "global_step"}


def test_the_oracle_and_the_reader_know_the_same_checksum():
    """The check value of CRC-32C: RFC 3720, appendix B.4, and every catalogue of CRCs."""
    assert foreign_files.crc32c(b"123456789") == tensorbundle._crc32c(b"123456789") == 0xE3069283


def test_variables_of_every_dtype_and_shape(tmp_path):
    torch.manual_seed(1)
    wanted = {
        "a": torch.randn(3, 4, 5),
        "a/b": torch.randn(()).double(),
        "a/bc": torch.randn(7).half(),
        "empty": torch.empty(0, 4),
        "z" * 300: torch.randn(2, 2).bfloat16(),
        "é": torch.arange(3),
    }
    foreign_files.write_bundle(tmp_path / "v", wanted)
    found = tensorbundle.variables(tmp_path / "v.index")
    assert set(found) == set(wanted)
    for name, variable in found.items():
        if wanted[name].dtype == torch.int64:
            assert variable.dtype is None
        else:
            assert bits({name: variable.read()}) == bits({name: wanted[name]})


def test_a_tensorflow_index_with_any_byte_wrong_is_refused(tmp_path, refused):
    directory = foreign_files.write_openai(tmp_path, hugging_face())
    index = directory / "model.ckpt.index"
    data, expected = index.read_bytes(), load_pretrained(directory)[1]
    for place in range(0, len(data), 5):
        broken = bytearray(data)
        broken[place] ^= 1 << (place % 8)
        index.write_bytes(broken)
        try:
            assert bits(load_pretrained(index)[1]) == bits(expected)  # bytes that nothing reads: the footer's padding
        except CheckpointError:
            continue
        assert place >= len(data) - 48
    for size in range(0, len(data), 61):
        index.write_bytes(data[:size])
        refused(index)


def test_tensorflow_data_is_checked_before_it_is_read(tmp_path, refused):
    directory = foreign_files.write_openai(tmp_path, hugging_face())
    data = directory / "model.ckpt.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(directory, "should end at byte", "which has")
    data.unlink()
    refused(directory, "needs model.ckpt.data-00000-of-00001, which isn't there")
    data.write_bytes(content)
    (directory / "hparams.json").write_text('{"n_vocab": 101, "n_ctx": 16, "n_embd": 32, "n_head": 4, "n_layer": 1}')
    refused(directory, "unknown h1/attn/c_attn/w [32, 96]")
    (directory / "hparams.json").write_text('{"n_vocab": 101}')
    refused(directory, "hparams.json lacks 'n_ctx'")
    foreign_files.write_bundle(directory / "model.ckpt", {"x": torch.ones(3)}, compression=1)
    refused(directory, "compressed (snappy)")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((1, 1, 4, 2**40), "should end at byte"),
        ((4, 1, 4, 12), "is said to have 12 bytes"),
        ((2**39, 2**39, 0, 12), "is said to have 12 bytes"),
        ((2**63, 1, 0, 12), "has shape"),
        ((3, 1, 2**63, 12), "should end at byte"),
    ],
)
def test_lying_tensorflow_entries_are_refused(entry, message, tmp_path, refused):
    rows_, columns, offset, size = entry
    field = foreign_files.field
    shape = field(2, field(1, rows_)) + field(2, field(1, columns))
    value = field(1, 1) + field(2, shape) + field(4, offset) + field(5, size)
    table = foreign_files.table([(b"", field(1, 1)), (b"model/wte", value)])
    (tmp_path / "model.ckpt.index").write_bytes(table)
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(bytes(64))
    refused(tmp_path, message)


# nanoGPT


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


# pytorch_model.bin and the book's files


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


# Pickles that mean harm, and pickles that are no model


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


def test_a_file_of_no_known_kind_is_refused(tmp_path, refused):
    for content in (b"", b"x", b"text of a reader " * 20, b"\x93NUMPY\x01\x00v\x00" + bytes(100)):
        (tmp_path / "model.bin").write_bytes(content)
        refused(tmp_path / "model.bin", "no checkpoint of a known format")


def test_what_save_as_cannot_write_is_refused(tmp_path):
    ours = tiny_model()
    for format, message in (
        ("gguf", r"format must be one of \['hf', 'nanogpt', 'llms-from-scratch', 'llmc'\], got 'gguf'"),
        ("nanogpt", "activation='gelu_tanh', not 'gelu', tie_weights=False, not True"),
        ("llmc", "can't say what the config says: tie_weights=False, not True"),
    ):
        with pytest.raises(ValueError, match=message):
            save_as(ours.config, ours.state_dict(), tmp_path / "x", format)
    with pytest.raises(ValueError, match="max_shard_bytes and pickled are for format 'hf'"):
        save_as(ours.config, ours.state_dict(), tmp_path / "x", "llms-from-scratch", pickled=True)
    with pytest.raises(ValueError, match="one of them at a time"):
        save_as(ours.config, ours.state_dict(), tmp_path / "x", "hf", max_shard_bytes=9, pickled=True)
    post = tiny_model(norm_position="post")
    with pytest.raises(ValueError, match="norm_position='post', not 'pre'"):
        save_as(post.config, post.state_dict(), tmp_path / "x", "hf")
    assert not list(tmp_path.iterdir())

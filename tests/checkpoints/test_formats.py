"""llm.c's files, and files of no known kind: the same model out of each, and none of the bad ones."""

from __future__ import annotations

import struct

import foreign_files
import numpy as np
import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face, rows
from models import tiny_model

from fastgpt import GPTModel
from fastgpt.checkpoints.weights import load, save_as


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

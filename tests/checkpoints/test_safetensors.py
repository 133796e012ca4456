"""Files that are no safetensors, and tensors that are not the model's: each is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import read, sharp, write
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.checkpoints.weights import CheckpointError, load_pretrained


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\x00" * 8,
        b"\xff" * 64,
        b"garbage that is text " * 50,
        (10**12).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{" * 100,
        (50).to_bytes(8, "little") + b"{" * 50,
        header({"wte.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 9),
        header({"wte.weight": {"dtype": "X32", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
        pickle.dumps({"wte.weight": [0.0] * 100}),
    ],
    ids=range(14),
)
def test_files_that_are_no_safetensors_are_refused(content, tmp_path, good, refused):
    shutil.copy(good / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, str(tmp_path / "model.safetensors"), "not a whole safetensors file")
    refused(tmp_path / "model.safetensors", "not a whole safetensors file")


def test_a_file_cut_anywhere_is_refused(tmp_path, good, refused):
    shutil.copy(good / "config.json", tmp_path)
    whole = (good / "model.safetensors").read_bytes()
    for size in (1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refused(tmp_path, "not a whole safetensors file")
    (tmp_path / "model.safetensors").write_bytes(whole + b"\x00")
    refused(tmp_path, "not a whole safetensors file")


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "ckpt.pt"])
def test_pickles_are_not_opened_unasked(name, tmp_path, good, refused):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    shutil.copy(good / "config.json", tmp_path)
    refused(path, name, "a pickle, which is opened only with allow_pickle=True")
    refused(tmp_path)
    shutil.copy(path, tmp_path / "model.safetensors")
    refused(tmp_path, "not a whole safetensors file")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(tmp_path, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_a_directory_of_nothing_says_what_was_looked_for(tmp_path, refused):
    refused(tmp_path, "no model.safetensors, nor any of", "pytorch_model.bin", "ckpt.pt", "model.ckpt.index")


def test_every_mismatch_is_listed_in_one_error(tmp_path, good, refused):
    tensors, config = read(good)
    del tensors["transformer.h.0.ln_1.weight"], tensors["transformer.ln_f.bias"]
    tensors["transformer.h.2.ln_1.weight"] = torch.ones(32)
    tensors["transformer.extra"] = torch.ones(2, 3)
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T
    tensors["transformer.h.0.attn.c_attn.bias"] = torch.ones(32)
    tensors["transformer.wpe.weight"] = torch.ones(16, 32, dtype=torch.int64)
    tensors["transformer.h.1.ln_2.bias"] = torch.ones(32, dtype=torch.bool)
    refused(
        write(tmp_path, tensors, config),
        "doesn't match its config in 8 places",
        "missing transformer.h.0.ln_1.weight [32]",
        "missing transformer.ln_f.bias [32]",
        "unknown transformer.h.2.ln_1.weight [32]",
        "unknown transformer.extra [2, 3]",
        "transformer.h.1.mlp.c_fc.weight is [128, 32], the config says [32, 128]",
        "transformer.h.0.attn.c_attn.bias is [32], the config says [96]",
        "transformer.wpe.weight has dtype I64, expected one of ['F64', 'F32', 'F16', 'BF16']",
        "transformer.h.1.ln_2.bias has dtype BOOL",
    )


def test_our_own_names_are_checked_as_well(tmp_path, refused):
    ours = sharp(norm_position="post")
    ours.save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    del tensors["trf_blocks.1.norm1.scale"]
    tensors["trf_blocks.0.att.W_rotary.weight"] = torch.ones(32, 32)
    tensors["out_head.weight"] = torch.ones(100, 32)
    refused(
        write(tmp_path, tensors, config),
        "in 3 places",
        "missing trf_blocks.1.norm1.scale [32]",
        "unknown trf_blocks.0.att.W_rotary.weight [32, 32]",
        "out_head.weight is [100, 32], the config says [101, 32]",
    )


def test_keys_of_both_kinds_of_prefix_are_a_mismatch(tmp_path, good, refused):
    tensors, config = read(good)
    tensors["h.0.ln_1.bias"] = tensors.pop("transformer.h.0.ln_1.bias")
    refused(write(tmp_path, tensors, config), "missing transformer.h.0.ln_1.bias", "unknown h.0.ln_1.bias")


def test_names_of_nobody_are_said_to_be_so(tmp_path, good, refused):
    refused(write(tmp_path, {}, read(good)[1]), "not those of a GPT-2 that is known here: there are none")
    refused(write(tmp_path, {"model.norm": torch.ones(3)}, read(good)[1]), "is known here: model.norm")


def test_a_file_of_one_tensor_lists_everything_else(tmp_path, good, refused):
    tensors, config = read(good)
    kept = {"transformer.wpe.weight": tensors["transformer.wpe.weight"]}
    said = refused(write(tmp_path, kept, config), "in 27 places", "missing transformer.wte.weight [101, 32]")
    assert said.count("missing") == 27


def test_a_head_that_is_not_the_embedding_of_a_tied_config_is_refused(tmp_path, good, refused):
    tensors, config = read(good)
    head = tensors["transformer.wte.weight"].clone()
    head[100, 31] += 1.0
    refused(write(tmp_path, tensors | {"lm_head.weight": head}, config), "the head differs from the token embedding")
    refused(write(tmp_path, tensors | {"lm_head.weight": head[:5]}, config), "lm_head.weight is [5, 32]")
    config["tie_word_embeddings"] = False
    loaded = GPTModel.from_pretrained(write(tmp_path, tensors | {"lm_head.weight": head}, config))
    assert torch.equal(loaded.out_head.weight, head)


def test_biases_that_were_trained_elsewhere_are_not_dropped(tmp_path, refused):
    sharp(qkv_bias=False, bias=False).save_pretrained(tmp_path / "ours")
    elsewhere = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        elsewhere.transformer.h[1].attn.c_attn.bias[40] = 0.5
        elsewhere.transformer.ln_f.bias[3] = torch.nan
    elsewhere.save_pretrained(tmp_path / "theirs")
    refused(
        tmp_path / "theirs",
        "the config leaves out weights that the checkpoint has",
        "trf_blocks.1.att.W_key.bias isn't zero",
        "final_norm.shift isn't zero",
    )
    tensors, config = read(tmp_path / "theirs")
    del config["fastgpt"]
    tensors["transformer.ln_f.bias"][3] = 0.25
    loaded = GPTModel.from_pretrained(write(tmp_path / "theirs", tensors, config))
    assert loaded.trf_blocks[1].att.W_key.bias.nonzero().tolist() == [[8]]
    assert loaded.final_norm.shift[3] == 0.25

"""config.json and its metadata: what is no config, and sizes that no file can have."""

from __future__ import annotations

import shutil

import pytest
import torch
from checkpoint_models import read, sharp, write
from models import TINY, tiny_config
from safetensors.torch import save_file

from fastgpt import GPTConfig, GPTModel
from fastgpt.checkpoints import weights
from fastgpt.checkpoints.weights import load_pretrained


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'"text"', "must hold a JSON object, got str"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "has 1,048,585 bytes; at most 1,048,576 are read"),
    ],
    ids=range(9),
)
def test_a_config_that_is_no_object_is_refused(content, message, tmp_path, good, refused):
    shutil.copy(good / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, str(tmp_path / "config.json"), message)


HUGE = 10**400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"n_positions": None}, "lacks 'n_positions'"),
        ({"n_embd": None}, "lacks 'n_embd'"),
        ({"n_layer": None}, "lacks 'n_layer'"),
        ({"n_head": None}, "lacks 'n_head'"),
        ({"vocab_size": "101"}, "vocab_size must be int, got '101' (str)"),
        ({"n_layer": 2.0}, "n_layers must be int, got 2.0 (float)"),
        ({"n_layer": True}, "n_layers must be int, got True (bool)"),
        ({"n_head": [4]}, "n_heads must be int, got [4] (list)"),
        ({"n_embd": {}}, "emb_dim must be int, got {} (dict)"),
        ({"n_embd": [32]}, "emb_dim must be int, got [32] (list)"),
        ({"resid_pdrop": "no"}, "drop_rate must be float, got 'no' (str)"),
        ({"resid_pdrop": float("nan")}, "drop_rate must be from 0 to 1, got nan"),
        ({"attn_pdrop": 1.5}, "attn_drop_rate must be from 0 to 1, got 1.5"),
        ({"layer_norm_epsilon": 0}, "norm_eps must be a positive number, got 0"),
        ({"layer_norm_epsilon": float("inf")}, "norm_eps must be a positive number, got inf"),
        ({"layer_norm_epsilon": HUGE}, "config.json: "),
        ({"resid_pdrop": HUGE}, "drop_rate must be from 0 to 1"),
        ({"tie_word_embeddings": 1}, "tie_weights must be bool, got 1 (int)"),
        ({"n_layer": 0}, "n_layers must be from 1 to 1,024, got 0"),
        ({"n_layer": -2}, "n_layers must be from 1 to 1,024, got -2"),
        ({"n_layer": 10**9}, "n_layers must be from 1 to 1,024, got 1,000,000,000"),
        ({"vocab_size": 2**40}, "vocab_size must be from 1 to 2,097,152"),
        ({"n_positions": 2**40}, "context_length must be from 1 to 1,048,576"),
        ({"n_embd": 2**40}, "emb_dim must be from 1 to 65,536"),
        ({"n_embd": HUGE}, "emb_dim must be from 1 to 65,536"),
        ({"n_head": 5}, "emb_dim must be divisible by n_heads, got emb_dim=32 and n_heads=5"),
        ({"model_type": "llama"}, "model_type 'llama'; only 'gpt2' and 'fastgpt' load"),
        ({"model_type": ["gpt2"]}, "model_type ['gpt2']"),
        ({"model_type": "fastgpt"}, "lacks 'fastgpt'"),
        ({"activation_function": "swish"}, "activation_function='swish'; known are ['gelu', 'gelu_new',"),
        ({"activation_function": ["gelu"]}, "activation_function=['gelu']; known are"),
        ({"n_inner": 64}, "n_inner=64; only four times n_embd loads"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"fastgpt": 3}, '"fastgpt" in config.json must be an object, got 3'),
        ({"fastgpt": []}, '"fastgpt" in config.json must be an object, got []'),
        ({"fastgpt": {}}, "config lacks ['vocab_size', 'context_length', 'emb_dim', 'n_heads', 'n_layers',"),
        ({"fastgpt": tiny_config().to_dict() | {"rope": 1}}, "config has unknown keys ['rope']"),
        ({"fastgpt": tiny_config().to_dict() | {"n_layers": "2"}}, "n_layers must be int, got '2' (str)"),
        ({"fastgpt": tiny_config().to_dict() | {"vocab_multiple": 2**30}}, "vocab_multiple must be from 1 to 4,096"),
    ],
    ids=str,
)
def test_bad_configs_are_refused_by_name(changes, message, tmp_path, good, refused):
    tensors, config = read(good)
    config |= changes
    for name in [name for name in changes if changes[name] is None]:
        del config[name]
    said = refused(write(tmp_path, tensors, config), message)
    assert len(said) < 1500


def test_a_config_that_asks_for_terabytes_allocates_nothing(tmp_path, good, refused):
    tensors, config = read(good)
    config |= {"n_embd": 2**16, "n_layer": 2**10, "vocab_size": 2**21, "n_positions": 2**20, "n_head": 2**10}
    refused(
        write(tmp_path, tensors, config),
        "transformer.wte.weight is [101, 32], the config says [2097152, 65536]",
        "missing transformer.h.1023.mlp.c_proj.bias [65536]",
    )


def test_a_config_that_contradicts_its_own_fastgpt_is_refused(tmp_path, refused):
    sharp().save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    changed = config | {"activation_function": "relu", "layer_norm_epsilon": 0.5, "n_head": 8}
    refused(
        write(tmp_path, tensors, changed),
        'contradicts its own "fastgpt"',
        "n_head=8 beside 4",
        "activation_function='relu' beside 'gelu_new'",
        "layer_norm_epsilon=0.5 beside 0.01",
    )
    del changed["fastgpt"]
    assert GPTModel.from_pretrained(write(tmp_path, tensors, changed)).config.activation == "relu"


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "3", "{}", '{"vocab_size": 101}'], ids=range(5))
def test_bad_metadata_is_refused(content, tmp_path, good, refused):
    tensors, _ = read(good)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"fastgpt": content})
    refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"wpe.weight": torch.tensor(1.0)},
        {"wte.weight": torch.ones(3)},
        {"wte.weight": torch.ones(101, 0)},
        {"wte.weight": torch.ones(101, 33)},
        {"wte.weight": None},
        {"h.x.ln_1.bias": torch.ones(64), "h.": torch.ones(1)},
    ],
    ids=range(6),
)
def test_bare_files_that_tell_no_sizes_are_refused(changes, tmp_path, refused):
    tensors = {"wte.weight": torch.ones(101, 64), "wpe.weight": torch.ones(16, 64)} | changes
    refused(write(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}))


def test_the_books_own_dict_is_a_config(tmp_path):
    ours = sharp(norm_eps=1e-5)
    write(tmp_path, ours.state_dict(), {**TINY, "kv_window_size": 4})
    assert GPTModel.from_pretrained(tmp_path).config == ours.config


def test_the_config_of_a_checkpoint_is_a_config(good):
    config, tensors = load_pretrained(good)
    assert config == GPTConfig(
        *(101, 16, 32, 4, 2, 0.1, True),
        tie_weights=True,
        init="gpt2",
        norm_eps=0.01,
        emb_drop_rate=0.1,
        attn_drop_rate=0.1,
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weights.expected_shapes(config)

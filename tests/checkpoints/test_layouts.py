"""State dicts from one layout to another, each against the program that names it so."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import IDS, bits, close, hugging_face, rows
from models import tiny_model
from nanogpt_oracle import NanoGPT
from torch import Tensor

from fastgpt import GPTModel
from fastgpt.checkpoints.layouts import differences, from_layout, from_params, infer, padded, to_layout, to_params
from fastgpt.checkpoints.names import LAYOUTS, CheckpointError, detect

BOOK = {"vocab_size": 101, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "drop_rate": 0.0}


def as_model(config: Any, tensors: dict[str, Tensor]) -> GPTModel:
    model = GPTModel(config).eval()
    model.load_state_dict(padded(tensors, config))
    return model


VARIANTS: list[dict[str, Any]] = [
    {"tie_weights": True},
    {"tie_weights": False},
    {"tie_weights": True, "qkv_bias": False},
    {"tie_weights": True, "qkv_bias": False, "bias": False, "vocab_multiple": 64},
    {"tie_weights": False, "bias": False},
]


HEADLESS = ("openai", "llmc")  # tied models only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "changes"),
    [(layout, c) for layout in LAYOUTS for c in VARIANTS if c["tie_weights"] or layout not in HEADLESS],
    ids=str,
)
def test_every_layout_gives_back_every_bit(layout, changes, dtype):
    model = tiny_model(**changes).to(dtype)
    theirs = to_layout(model.config, model.state_dict(), layout)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in theirs.items()}
    config, back = from_layout(wrapped, model.config, None if layout != "llmc" else layout)
    assert config == model.config
    assert bits(back) == bits(rows(model))


def test_detection_tells_the_layouts_apart():
    model = tiny_model(tie_weights=True)
    for layout in ("gpt2", "nanogpt", "openai", "fastgpt", "llms-from-scratch-fast"):
        state = to_layout(model.config, model.state_dict(), layout)
        assert detect({name: tuple(tensor.shape) for name, tensor in state.items()}) == layout
    bare = to_layout(model.config, model.state_dict(), "nanogpt")
    shapes = {name.removeprefix("transformer."): tuple(tensor.shape) for name, tensor in bare.items()}
    assert detect(shapes) == "nanogpt"


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_in_memory_both_ways(tied):
    theirs = hugging_face(tie_word_embeddings=tied)
    state = theirs.state_dict()
    config, tensors = from_layout(state, tiny_model(tie_weights=tied).config)
    close(as_model(config, tensors)(IDS), theirs(IDS).logits)
    assert tensors["trf_blocks.0.att.W_key.weight"].untyped_storage().data_ptr() == (
        state["transformer.h.0.attn.c_attn.weight"].untyped_storage().data_ptr()
    )
    ours = tiny_model(tie_weights=tied)
    missing, unexpected = theirs.load_state_dict(to_layout(ours.config, ours.state_dict(), "gpt2"), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    close(theirs(IDS).logits, ours(IDS))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_in_memory_both_ways(bias):
    torch.manual_seed(4)
    theirs = NanoGPT(101, 16, 32, 4, 2, bias).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = tiny_model(tie_weights=True, activation="gelu", bias=bias, qkv_bias=bias)
    config, tensors = from_layout(theirs.state_dict(), ours.config)
    reference = theirs(IDS)
    close(as_model(config, tensors)(IDS), reference[0] if isinstance(reference, tuple) else reference)
    theirs.load_state_dict(to_layout(ours.config, ours.state_dict(), "nanogpt"))
    reference = theirs(IDS)
    close(reference[0] if isinstance(reference, tuple) else reference, ours(IDS))


def test_qkv_biases_alone_make_all_of_nanogpts():
    ours = tiny_model(tie_weights=True, bias=False, qkv_bias=True)
    state = to_layout(ours.config, ours.state_dict(), "nanogpt")
    assert not state["transformer.h.1.mlp.c_fc.bias"].any()
    assert not state["transformer.ln_f.bias"].any()
    assert state["transformer.h.1.attn.c_attn.bias"].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTModel", "GPTModelFast"])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_books_models_in_memory_both_ways(name, qkv_bias):
    book = pytest.importorskip("llms_from_scratch.ch04", reason="needs llms_from_scratch")
    theirs = getattr(book, name)({**BOOK, "qkv_bias": qkv_bias}).eval()
    ours = tiny_model(qkv_bias=qkv_bias)
    layout = "llms-from-scratch" + ("-fast" if name == "GPTModelFast" else "")
    state = to_layout(ours.config, ours.state_dict(), layout, masks=name == "GPTModel")
    assert list(state) == list(theirs.state_dict())
    if name == "GPTModel":
        masks = [tensor for key, tensor in state.items() if key.endswith("mask")]
        assert all(torch.equal(mask, theirs.state_dict()["trf_blocks.0.att.mask"]) for mask in masks)
        assert len({mask.data_ptr() for mask in masks}) == 1
    theirs.load_state_dict(state)
    close(theirs(IDS), ours(IDS))
    fresh = getattr(book, name)({**BOOK, "qkv_bias": qkv_bias}).eval()
    config, tensors = from_layout(fresh.state_dict(), ours.config)
    close(as_model(config, tensors)(IDS), fresh(IDS))


@torch.no_grad()
def test_the_books_params_tree_both_ways():
    book = pytest.importorskip("llms_from_scratch.ch05", reason="needs llms_from_scratch and what its ch05 imports")
    ours = tiny_model(tie_weights=True)
    params = to_params(ours.config, ours.state_dict())
    theirs = sys.modules["llms_from_scratch.ch04"].GPTModel({**BOOK, "qkv_bias": True}).eval()
    book.load_weights_into_gpt(theirs, params)
    close(theirs(IDS), ours(IDS))
    config, tensors = from_params(params, n_heads=4)
    assert (config.vocab_size, config.context_length, config.n_layers, config.tie_weights) == (101, 16, 2, True)
    assert bits(tensors) == bits(rows(ours))
    assert tensors["tok_emb.weight"].data_ptr() == params["wte"].ctypes.data


def test_the_params_tree_is_where_the_book_says():
    """Written out from the table of https://github.com/rasbt/LLMs-from-scratch, ch05, for block 1."""
    ours = tiny_model(tie_weights=True, qkv_bias=False)
    params, state = to_params(ours.config, ours.state_dict()), ours.state_dict()
    blocks = params["blocks"]
    assert len(blocks) == 2
    assert set(params) == {"wte", "wpe", "g", "b", "blocks"}
    part = [state[f"trf_blocks.1.att.W_{x}.weight"].numpy().T for x in ("query", "key", "value")]
    assert np.array_equal(blocks[1]["attn"]["c_attn"]["w"], np.concatenate(part, axis=1))
    assert np.array_equal(blocks[1]["attn"]["c_attn"]["b"], np.zeros(96, dtype=np.float32))
    assert np.array_equal(blocks[1]["attn"]["c_proj"]["w"], state["trf_blocks.1.att.out_proj.weight"].numpy().T)
    assert np.array_equal(blocks[1]["mlp"]["c_proj"]["w"], state["trf_blocks.1.ff.layers.2.weight"].numpy().T)
    assert np.array_equal(blocks[1]["ln_2"]["g"], state["trf_blocks.1.norm2.scale"].numpy())
    assert np.array_equal(params["b"], state["final_norm.shift"].numpy())
    half = tiny_model(tie_weights=True).bfloat16()
    tree = to_params(half.config, half.state_dict())
    assert tree["wte"].dtype == np.float32
    assert np.array_equal(tree["wte"], half.state_dict()["tok_emb.weight"].float().numpy())


def test_shapes_tell_what_they_can():
    model = tiny_model(emb_dim=128, n_heads=2, n_layers=3, qkv_bias=False)
    for layout in ("fastgpt", "llms-from-scratch-fast"):
        state = to_layout(model.config, model.state_dict(), layout)
        assert from_layout(state)[0] == model.config.replace(drop_rate=0.1)
    tied = tiny_model(emb_dim=128, n_heads=2, tie_weights=True)
    config, _ = from_layout(to_layout(tied.config, tied.state_dict(), "gpt2"))
    assert config == tied.config.replace(drop_rate=0.1, init="gpt2")
    state = to_layout(tied.config, tied.state_dict(), "nanogpt")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"nanoGPT's, which computes the exact GELU, and minGPT's and llm\.c's"):
        from_layout(state)
    assert infer(shapes, "nanogpt", activation="gelu").activation == "gelu"
    assert infer(shapes, "nanogpt", 8, "gelu").n_heads == 8


def test_what_a_program_computes_otherwise_is_said():
    plain = tiny_model().config
    assert differences(plain, "gpt2") == {}
    assert differences(plain, "nanogpt") == {"activation": "gelu", "tie_weights": True}
    assert differences(plain.replace(norm_eps=0.01, activation="relu"), "llmc") == {
        "activation": "gelu_tanh",
        "norm_eps": 1e-5,
        "tie_weights": True,
    }
    assert differences(plain.replace(norm_position="post", causal=False, head_bias=True), "gpt2") == {
        "norm_position": "pre",
        "causal": True,
        "head_bias": False,
    }


def test_what_cannot_be_mapped_is_refused():
    model = tiny_model(head_bias=True)
    for layout in ("gpt2", "nanogpt", "llms-from-scratch-fast"):
        with pytest.raises(ValueError, match=r"has no name for out_head\.bias"):
            to_layout(model.config, model.state_dict(), layout)
    with pytest.raises(ValueError, match=r"'openai' has no name for out_head\.weight and out_head\.bias"):
        to_layout(model.config, model.state_dict(), "openai")
    plain = tiny_model()
    with pytest.raises(ValueError, match=r"layout must be one of .*'gpt2'.*, got 'bert'"):
        to_layout(plain.config, plain.state_dict(), "bert")
    with pytest.raises(ValueError, match="only the book's layout has masks"):
        to_layout(plain.config, plain.state_dict(), "gpt2", masks=True)
    with pytest.raises(ValueError, match=r"(?s)in 1 places.*tok_emb\.weight is missing"):
        to_layout(plain.config, {k: v for k, v in plain.state_dict().items() if k != "tok_emb.weight"}, "gpt2")
    state = to_layout(plain.config, plain.state_dict(), "gpt2")
    with pytest.raises(CheckpointError, match=r"'_orig_mod\.lm_head\.weight' and 'lm_head\.weight' are both"):
        from_layout(state | {"_orig_mod.lm_head.weight": state["lm_head.weight"]}, plain.config)
    with pytest.raises(CheckpointError, match=r"(?s)2 places.*missing transformer\.wpe\.weight.*unknown extra \[3\]"):
        from_layout({k: v for k, v in state.items() if "wpe" not in k} | {"extra": torch.ones(3)}, plain.config)
    with pytest.raises(CheckpointError, match="the head differs from the token embedding"):
        from_layout(state, plain.config.replace(tie_weights=True))
    with pytest.raises(CheckpointError, match=r"trf_blocks\.0\.att\.W_key\.bias isn't zero"):
        from_layout(state, plain.config.replace(qkv_bias=False))

"""Name tables: how each program that reads GPT-2 calls its weights, and how it keeps them. Data; `layouts` works by it.

    layout                    whose names                                                      linear weights
    fastgpt                   GPTModel's own                                                   [out, in]
    llms-from-scratch         the book's GPTModel: the same names, all biases but qkv's, the   [out, in]
                              head always there, causal masks as buffers
    llms-from-scratch-fast    its GPTModelFast: queries, keys and values packed                [out, in]
    gpt2                      transformers' GPT-2, which vLLM serves too                       [in, out] (Conv1D)
    nanogpt                   nanoGPT, minGPT: GPT-2's names; all biases or none; the head     [out, in]
                              always there
    llmc                      llm.c: GPT-2's names, which its files leave out; no head         [out, in]
    openai                    OpenAI's TensorFlow variables, without `model/`                  [in, out]

Shapes and orientation are facts of transformers' modeling_gpt2.py, https://github.com/karpathy/nanoGPT (model.py),
https://github.com/openai/gpt-2 (model.py) and https://github.com/rasbt/LLMs-from-scratch (ch04, ch05).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastgpt.config import GPTConfig

Table = dict[str, tuple[str, str]]  # their name -> (ours, how); {i} is the layer, {qkv} one of QKV
Shapes = Mapping[str, tuple[int, ...]]
Plan = list[tuple[str, str, str]]  # (their name, ours, how)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
QKV = ("W_query", "W_key", "W_value")
PADDED = ("tok_emb.weight", "out_head.weight", "out_head.bias")  # rows: padded_vocab_size in a model, vocab_size here

# How: "copy" as it is, "qkv" three of ours one below the other, then "T" transposed.
GPT2_TOP: Table = {
    "wte.weight": ("tok_emb.weight", "copy"),
    "wpe.weight": ("pos_emb.weight", "copy"),
    "ln_f.weight": ("final_norm.scale", "copy"),
    "ln_f.bias": ("final_norm.shift", "copy"),
    "lm_head.weight": ("out_head.weight", "copy"),
}
GPT2_LAYER: Table = {
    "h.{i}.ln_1.weight": ("trf_blocks.{i}.norm1.scale", "copy"),
    "h.{i}.ln_1.bias": ("trf_blocks.{i}.norm1.shift", "copy"),
    "h.{i}.attn.c_attn.weight": ("trf_blocks.{i}.att.{qkv}.weight", "qkv T"),
    "h.{i}.attn.c_attn.bias": ("trf_blocks.{i}.att.{qkv}.bias", "qkv"),
    "h.{i}.attn.c_proj.weight": ("trf_blocks.{i}.att.out_proj.weight", "T"),
    "h.{i}.attn.c_proj.bias": ("trf_blocks.{i}.att.out_proj.bias", "copy"),
    "h.{i}.ln_2.weight": ("trf_blocks.{i}.norm2.scale", "copy"),
    "h.{i}.ln_2.bias": ("trf_blocks.{i}.norm2.shift", "copy"),
    "h.{i}.mlp.c_fc.weight": ("trf_blocks.{i}.ff.layers.0.weight", "T"),
    "h.{i}.mlp.c_fc.bias": ("trf_blocks.{i}.ff.layers.0.bias", "copy"),
    "h.{i}.mlp.c_proj.weight": ("trf_blocks.{i}.ff.layers.2.weight", "T"),
    "h.{i}.mlp.c_proj.bias": ("trf_blocks.{i}.ff.layers.2.bias", "copy"),
}
NANOGPT_LAYER: Table = {
    theirs: (ours, how.replace("qkv T", "qkv").replace("T", "copy")) for theirs, (ours, how) in GPT2_LAYER.items()
}
OPENAI_TOP: Table = {
    "wte": ("tok_emb.weight", "copy"),
    "wpe": ("pos_emb.weight", "copy"),
    "ln_f/g": ("final_norm.scale", "copy"),
    "ln_f/b": ("final_norm.shift", "copy"),
}
OPENAI_LAYER: Table = {
    "h{i}/ln_1/g": ("trf_blocks.{i}.norm1.scale", "copy"),
    "h{i}/ln_1/b": ("trf_blocks.{i}.norm1.shift", "copy"),
    "h{i}/attn/c_attn/w": ("trf_blocks.{i}.att.{qkv}.weight", "qkv T"),
    "h{i}/attn/c_attn/b": ("trf_blocks.{i}.att.{qkv}.bias", "qkv"),
    "h{i}/attn/c_proj/w": ("trf_blocks.{i}.att.out_proj.weight", "T"),
    "h{i}/attn/c_proj/b": ("trf_blocks.{i}.att.out_proj.bias", "copy"),
    "h{i}/ln_2/g": ("trf_blocks.{i}.norm2.scale", "copy"),
    "h{i}/ln_2/b": ("trf_blocks.{i}.norm2.shift", "copy"),
    "h{i}/mlp/c_fc/w": ("trf_blocks.{i}.ff.layers.0.weight", "T"),
    "h{i}/mlp/c_fc/b": ("trf_blocks.{i}.ff.layers.0.bias", "copy"),
    "h{i}/mlp/c_proj/w": ("trf_blocks.{i}.ff.layers.2.weight", "T"),
    "h{i}/mlp/c_proj/b": ("trf_blocks.{i}.ff.layers.2.bias", "copy"),
}
_OWN_TOP = (
    "tok_emb.weight",
    "pos_emb.weight",
    "final_norm.scale",
    "final_norm.shift",
    "out_head.weight",
    "out_head.bias",
)
_OWN_LAYER = (
    *(f"att.{name}.{kind}" for name in (*QKV, "out_proj") for kind in ("weight", "bias")),
    *(f"ff.layers.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")),
    *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("scale", "shift")),
)
OWN_TOP: Table = {name: (name, "copy") for name in _OWN_TOP}
OWN_LAYER: Table = {name: (name, "copy") for name in (f"trf_blocks.{{i}}.{part}" for part in _OWN_LAYER)}
FAST_TOP: Table = {
    "tok_emb.weight": ("tok_emb.weight", "copy"),
    "pos_emb.weight": ("pos_emb.weight", "copy"),
    "final_norm.weight": ("final_norm.scale", "copy"),
    "final_norm.bias": ("final_norm.shift", "copy"),
    "out_head.weight": ("out_head.weight", "copy"),
}
FAST_LAYER: Table = {
    "trf_blocks.{i}.att.qkv.weight": ("trf_blocks.{i}.att.{qkv}.weight", "qkv"),
    "trf_blocks.{i}.att.qkv.bias": ("trf_blocks.{i}.att.{qkv}.bias", "qkv"),
    "trf_blocks.{i}.att.proj.weight": ("trf_blocks.{i}.att.out_proj.weight", "copy"),
    "trf_blocks.{i}.att.proj.bias": ("trf_blocks.{i}.att.out_proj.bias", "copy"),
    "trf_blocks.{i}.ff.layers.0.weight": ("trf_blocks.{i}.ff.layers.0.weight", "copy"),
    "trf_blocks.{i}.ff.layers.0.bias": ("trf_blocks.{i}.ff.layers.0.bias", "copy"),
    "trf_blocks.{i}.ff.layers.2.weight": ("trf_blocks.{i}.ff.layers.2.weight", "copy"),
    "trf_blocks.{i}.ff.layers.2.bias": ("trf_blocks.{i}.ff.layers.2.bias", "copy"),
    "trf_blocks.{i}.norm1.weight": ("trf_blocks.{i}.norm1.scale", "copy"),
    "trf_blocks.{i}.norm1.bias": ("trf_blocks.{i}.norm1.shift", "copy"),
    "trf_blocks.{i}.norm2.weight": ("trf_blocks.{i}.norm2.scale", "copy"),
    "trf_blocks.{i}.norm2.bias": ("trf_blocks.{i}.norm2.shift", "copy"),
}


@dataclass(frozen=True)
class Layout:
    """One way of naming a GPT's tensors, and what the program that reads it computes."""

    top: Table
    layer: Table
    prefix: str = ""  # written before every name but the head's; read with it or without
    # "own" and, for those of queries, keys and values, "all but qkv": as the config has them; "all"; "all or none"
    biases: str = "own"
    head: bool = False  # a tied head is there too
    ignored: tuple[str, ...] = ()  # endings of the causal masks' names
    computes: dict[str, Any] = field(default_factory=dict)  # what its program computes, whatever a GPTConfig says


_PRE = {"norm_position": "pre", "causal": True, "head_bias": False}
_GPT2 = {**_PRE, "activation": "gelu_tanh", "norm_eps": 1e-5}
LAYOUTS = {
    "fastgpt": Layout(OWN_TOP, OWN_LAYER, ignored=(".att.mask",)),
    "llms-from-scratch": Layout(
        OWN_TOP, OWN_LAYER, biases="all but qkv", head=True, ignored=(".att.mask",), computes=_GPT2
    ),
    "llms-from-scratch-fast": Layout(FAST_TOP, FAST_LAYER, biases="all but qkv", head=True, computes=_GPT2),
    "gpt2": Layout(
        GPT2_TOP, GPT2_LAYER, "transformer.", "all", ignored=(".attn.bias", ".attn.masked_bias"), computes=_PRE
    ),
    "nanogpt": Layout(
        GPT2_TOP,
        NANOGPT_LAYER,
        "transformer.",
        "all or none",
        head=True,
        ignored=(".attn.bias",),
        computes={**_GPT2, "activation": "gelu", "tie_weights": True},
    ),
    "llmc": Layout(GPT2_TOP, NANOGPT_LAYER, "transformer.", "all", computes={**_GPT2, "tie_weights": True}),
    "openai": Layout(OPENAI_TOP, OPENAI_LAYER, biases="all", computes={**_GPT2, "tie_weights": True}),
}
HEADS = ("lm_head.weight", "out_head.weight")


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded; the message lists everything that is wrong with it."""


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every name of GPTModel's state dict with its shape; vocab_size rows, a tied head once."""
    C, H, V = config.emb_dim, config.hidden_dim, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (V, C), "pos_emb.weight": (config.context_length, C)}
    for i in range(config.n_layers):
        block = f"trf_blocks.{i}."
        for name in QKV:
            shapes[f"{block}att.{name}.weight"] = (C, C)
            shapes[f"{block}att.{name}.bias"] = (C,)
        shapes |= {f"{block}att.out_proj.weight": (C, C), f"{block}att.out_proj.bias": (C,)}
        shapes |= {f"{block}ff.layers.0.weight": (H, C), f"{block}ff.layers.0.bias": (H,)}
        shapes |= {f"{block}ff.layers.2.weight": (C, H), f"{block}ff.layers.2.bias": (C,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.scale": (C,), f"{block}{norm}.shift": (C,)}
    shapes |= {"final_norm.scale": (C,), "final_norm.shift": (C,)}
    if not config.tie_weights:
        shapes["out_head.weight"] = (V, C)
    if config.head_bias:
        shapes["out_head.bias"] = (V,)
    absent = absent_biases(config)
    return {name: shape for name, shape in shapes.items() if name not in absent}


def absent_biases(config: GPTConfig) -> set[str]:
    """Biases that GPT-2 has and a model of this config doesn't: zeros in its layout, dropped on the way back."""
    names = {f"trf_blocks.{i}.att.{name}.bias" for i in range(config.n_layers) for name in QKV if not config.qkv_bias}
    if config.bias:
        return names
    parts = ("att.out_proj.bias", "ff.layers.0.bias", "ff.layers.2.bias", "norm1.shift", "norm2.shift")
    return names | {f"trf_blocks.{i}.{part}" for i in range(config.n_layers) for part in parts} | {"final_norm.shift"}


def stored_config(config: GPTConfig, layout: str) -> GPTConfig:
    """The config with the biases that the layout has; what they add to `config`'s are zeros."""
    biases = LAYOUTS[layout].biases
    if biases == "all" or (biases == "all or none" and (config.bias or config.qkv_bias)):
        return config.replace(bias=True, qkv_bias=True)
    return config.replace(bias=True) if biases == "all but qkv" else config


def differences(config: GPTConfig, layout: str) -> dict[str, Any]:
    """Fields of the config that the layout's program computes otherwise, with its value; empty where it computes the same."""
    computes = LAYOUTS[layout].computes
    return {name: value for name, value in computes.items() if getattr(config, name) != value}


def unwrapped(names: Mapping[str, Any]) -> dict[str, str]:
    """Name without torch.compile's `_orig_mod.` and DataParallel's `module.` -> name. CheckpointError where two become one."""
    bare: dict[str, str] = {}
    for name in names:
        short = name.replace("_orig_mod.", "")
        while short.startswith("module."):
            short = short.removeprefix("module.")
        if short in bare:
            raise CheckpointError(f"{name!r} and {bare[short]!r} are both {short!r}")
        bare[short] = name
    return bare


def detect(shapes: Shapes) -> str:
    """The layout of unwrapped names. CheckpointError where they are nobody's."""
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    if "tok_emb.weight" in shapes:
        return "llms-from-scratch-fast" if any(name.endswith(".att.qkv.weight") for name in shapes) else "fastgpt"
    if "wte" in shapes:
        return "openai"
    if not any(name in bare for name in ("wte.weight", "wpe.weight")) and not any(name in shapes for name in HEADS):
        raise CheckpointError(
            f"the names are not those of a GPT-2 that is known here: {', '.join(sorted(shapes)[:5]) or 'there are none'}"
        )
    packed = next((shape for name, shape in bare.items() if name.endswith("attn.c_attn.weight")), ())
    return "nanogpt" if len(packed) == 2 and packed[0] == 3 * packed[1] else "gpt2"


def known(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {list(LAYOUTS)}, got {layout!r}")
    return layout


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors calls it; torch's own name for what isn't a float of DTYPES."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def names_of(config: GPTConfig, layout: str) -> Plan:
    """(their name without prefix, ours, how) of everything that the layout holds of a config with its biases."""
    form, shapes = LAYOUTS[layout], expected_shapes(config)
    before = {theirs: value for theirs, value in form.top.items() if value[0].startswith(("tok_emb", "pos_emb"))}
    rows = list(before.items())
    for i in range(config.n_layers):
        rows += [
            (theirs.replace("{i}", str(i)), (ours.replace("{i}", str(i)), how))
            for theirs, (ours, how) in form.layer.items()
        ]
    rows += [(theirs, value) for theirs, value in form.top.items() if theirs not in before]
    return [(theirs, ours, how) for theirs, (ours, how) in rows if ours.replace("{qkv}", QKV[0]) in shapes]


def their_shape(full: Shapes, ours: str, how: str) -> tuple[int, ...]:
    shape = full[ours.replace("{qkv}", QKV[0])]
    shape = (3 * shape[0], *shape[1:]) if "qkv" in how else shape
    return shape[::-1] if "T" in how else shape

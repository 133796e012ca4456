"""from_hf and to_hf: one model's parameters as views of the other's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2

from fastgpt.checkpoints import dialects, layouts
from fastgpt.checkpoints.names import QKV, differences
from fastgpt.model import GPTModel


def from_hf(hf_model: modeling_gpt2.GPT2LMHeadModel, *, copy: bool = False) -> GPTModel:
    """A GPTModel on the memory of a GPT2LMHeadModel's parameters: training either one changes both.

    Every parameter shares storage: embeddings, norms, biases and a tied head as they are, linear weights as transposed views of
    the [in, out] matrices, queries, keys and values as thirds of c_attn. Parameters of the two models are different objects with
    gradients of their own. What replaces a parameter's storage (`.to`, an assigning load, resized embeddings) ends the sharing.

    Such thirds have gaps between their rows, over which torch's fused optimizers write: on a CPU without a word. Steps with
    fused=True on parameters like that are refused from here on; train with foreach, the default of torch.optim, or a copy.
    On a GPU, `generate` makes each token by GEMMs on those views, in a CUDA graph; the fused kernels need a copy's matrices.

    Args:
        hf_model: plain, accelerated or not; merge LoRA first (`merge_and_unload`).
        copy: True gives contiguous parameters of their own.

    Raises TypeError for another class of model; ValueError for a config that GPTModel can't compute, and for parameters under
    other names than GPT-2's, each listed.
    """
    if not isinstance(hf_model, modeling_gpt2.GPT2LMHeadModel):
        raise TypeError(f"hf_model must be a transformers GPT2LMHeadModel, got {type(hf_model).__name__}")
    settings = {name: value for name, value in hf_model.config.to_dict().items() if name != "fastgpt"}
    config, tensors = layouts.from_layout(hf_model.state_dict(), dialects.from_config_json(settings), "gpt2")
    with torch.device("meta"):
        model = GPTModel(config)
    model.load_state_dict(_own(layouts.padded(tensors, config), copy), assign=True)
    if not copy:
        _guard_fused_optimizers()
    if config.tie_weights:
        model.out_head.weight = model.tok_emb.weight
    return model.train(hf_model.training)


def to_hf(model: GPTModel, *, copy: bool = False) -> modeling_gpt2.GPT2LMHeadModel:
    """A GPT2LMHeadModel on the memory of a GPTModel's parameters, as `from_hf` the other way.

    c_attn is the exception: transformers has queries, keys and values side by side in one matrix. Where they are (a model from
    `from_hf`) it is shared, else a copy. Zeros stand for biases that only GPT-2 has.

    Raises TypeError for another class of model; ValueError for a config that GPT-2 can't compute (post-norm, a head bias,
    non-causal attention), and for swapped submodules.
    """
    if not isinstance(model, GPTModel):
        raise TypeError(f"model must be a fastgpt GPTModel, got {type(model).__name__}")
    config, state_dict = model.config, model.state_dict()
    other = differences(config, "gpt2")
    if other:
        raise ValueError(f"GPT-2 has {other}, and this model has not: {config}")
    tensors = layouts.to_layout(config, state_dict, "gpt2")
    for i in range(config.n_layers):
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            joined = _joined([state_dict[f"trf_blocks.{i}.att.{name}.{kind}"] for name in QKV])
            if joined is not None:
                tensors[f"transformer.h.{i}.attn.c_attn.{kind}"] = joined.T if kind == "weight" else joined
    if config.tie_weights:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    settings = {name: value for name, value in dialects.config_json(config).items() if name != "fastgpt"}
    with torch.device("meta"):
        hf_model = modeling_gpt2.GPT2LMHeadModel(GPT2Config(**settings))
    hf_model.load_state_dict(_own(tensors, copy), assign=True)
    hf_model.tie_weights()
    return hf_model.train(model.training)


def _joined(three: list[Tensor]) -> Tensor | None:
    """The tensor that the three are consecutive rows of, where they lie in one storage like that."""
    first = three[0]
    for n, tensor in enumerate(three):
        offset = first.storage_offset() + n * first.shape[0] * first.stride(0)
        same_storage = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same_storage and tensor.storage_offset() == offset and tensor.stride() == first.stride()):
            return None
    return first.as_strided((3 * first.shape[0], *first.shape[1:]), first.stride())


def _own(tensors: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()} if copy else tensors


@functools.cache
def _guard_fused_optimizers() -> None:
    """Have every optimizer of the process look at its fused groups' parameters before a step; once is enough."""
    register_optimizer_step_pre_hook(_refuse_gaps)


def _refuse_gaps(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"] if group.get("fused") else ():
            span = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
            if span > p.numel() > 0:
                raise ValueError(
                    f"a fused optimizer would write over what lies between the rows of a parameter {list(p.shape)} with strides "
                    f"{list(p.stride())}, as from_hf gives queries, keys and values; use from_hf(..., copy=True) or fused=False"
                )

"""transformers' GPT-2 on these ops, in place; and each model's weights in the other, without a copy of the network.

    accelerate(hf_model)    the same object on other kernels: same parameters, same names; restore(hf_model) undoes it
    explain(hf_model)       what its last call's attention ran on, and why
    from_hf(hf_model)       -> GPTModel
    to_hf(model)            -> GPT2LMHeadModel

What an accelerated model runs:

    part                               runs on
    norms, residual sum + second norm  ops.layer_norm, ops.add_layer_norm
    c_attn, c_proj, feed-forward       ops.linear, ops.mlp on views of the [in, out] weights, not on copies
    attention                          ops.attention; one new token on a GPU: ops.decode_attention. Where the kernels run, padding
                                       and packed documents are first keys for them (masks.py)
    attention with another mask        torch's scaled_dot_product_attention, as before: masks with holes, [B, 1, T, S] ones, a
                                       static cache while decoding
    output_attentions=True             transformers' eager attention, in that call: a fused one never has the probabilities
    loss of labels                     ops.cross_entropy on the logits; with return_logits=False ops.linear_cross_entropy

Attention goes through transformers' own registry (`AttentionInterface`) under the name "fastgpt". For the rest, `accelerate`
gives plain submodules a subclass of the same name (modules.py), so that PEFT, FSDP's wrapping policies, hooks, gradient
checkpointing, torch.compile, copies and pickles see what they know. A submodule that somebody wrapped, replaced or hooked is
called as a module.
`set_attn_implementation` goes on working; transformers' `generate_batch`, which has kernels of its own, asks for "sdpa".

Dropout keeps transformers' probabilities and places. On the reference path it draws the same masks from the same generator;
the attention kernel draws its own.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError("fastgpt.compat.huggingface needs transformers: pip install 'fastgpt-triton[hf]'")

from fastgpt.compat.huggingface.convert import from_hf, to_hf
from fastgpt.compat.huggingface.inplace import accelerate, explain, restore

__all__ = ["accelerate", "explain", "from_hf", "restore", "to_hf"]

"""accelerate and restore: one class of module for another, in a model that stays the same object."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers.models.gpt2 import modeling_gpt2

from fastgpt.checkpoints import dialects
from fastgpt.compat.huggingface.masks import first_keys
from fastgpt.compat.huggingface.modules import ATTENTION, ORIGINALS, SWAPS, WEIGHTS, LayerNorm, causal_lm_loss
from fastgpt.config import ContextLengthError

OLDEST = (5, 17)  # the oldest transformers that this is tested with; blocks of 5.0 return tuples
ATTRIBUTE = "_fastgpt_replaced_attention"  # of an accelerated model: the attention implementation to go back to
TAKEN = "_fastgpt_attention_taken"  # of its GPT2Model: what the last call's attention ran on, and why
_PARAMETERS = tuple(inspect.signature(modeling_gpt2.GPT2Model.forward).parameters)[1:]
# What GPT-2 of transformers 4 acted on and 5 takes and ignores: the answer would be another than the caller believes.
_IGNORED = ("head_mask", "cross_attn_head_mask", "past", "layer_past")

_Model = TypeVar("_Model", bound=modeling_gpt2.GPT2PreTrainedModel)


def accelerate(hf_model: _Model, *, return_logits: bool = True) -> _Model:
    """Make a loaded transformers GPT-2 run on fastgpt's ops, in place, and return it.

    Parameters stay the same objects under the same names, so that an optimizer made before goes on working, and what
    `save_pretrained` writes doesn't change. Accelerating a second time is accelerating anew.

    Args:
        hf_model: GPT2LMHeadModel, GPT2Model, GPT2ForSequenceClassification or another model around a GPT2Model. Of a PEFT
            model pass `peft_model.get_base_model()`; wrap in DDP or compile afterwards.
        return_logits: False, for a GPT2LMHeadModel: a forward in training mode with labels computes its loss from the hidden
            states, chunk by chunk, and returns logits=None. In eval mode, or without labels, logits are returned as ever.

    Raises:
        TypeError: not one of transformers' GPT-2 models.
        ValueError: cross-attention, an activation that the ops don't have, a loss function of the user's own with
            return_logits=False, or transformers older than 5.17.

    An accelerated model refuses more positions than n_positions before it computes anything (ContextLengthError, an IndexError
    and a ValueError), and arguments that transformers 5 takes and ignores, such as head_mask (TypeError).
    """
    if not isinstance(hf_model, modeling_gpt2.GPT2PreTrainedModel):
        raise TypeError(
            "hf_model must be a transformers GPT-2 model (of a PEFT, DDP or compiled one, the model inside), "
            f"got {type(hf_model).__name__}"
        )
    if tuple(int(part) for part in transformers_version.split(".")[:2]) < OLDEST:
        raise ValueError(f"accelerate needs transformers {OLDEST[0]}.{OLDEST[1]} or later, got {transformers_version}")
    config = hf_model.config
    if config.add_cross_attention:
        raise ValueError("accelerate has no cross-attention, got a config with add_cross_attention=True")
    if config.activation_function not in dialects.GPT2_ACTIVATIONS:
        raise ValueError(
            f"config.activation_function must be one of {sorted(dialects.GPT2_ACTIVATIONS)}, got {config.activation_function!r}"
        )
    if ATTRIBUTE in hf_model.__dict__:
        restore(hf_model)
    causal_lm = type(hf_model) is modeling_gpt2.GPT2LMHeadModel
    # Not hf_model.loss_function: to ask for it prints a warning about the model's loss_type, which is None as a rule.
    loss_type = getattr(hf_model, "loss_type", None)
    standard_loss = causal_lm and "_loss_function" not in hf_model.__dict__ and loss_type in (None, "ForCausalLM")
    if not return_logits and not standard_loss:
        what = f"the loss function {hf_model.loss_function}" if causal_lm else type(hf_model).__name__
        raise ValueError(f"return_logits=False is for a GPT2LMHeadModel with its standard loss, got {what}")
    if standard_loss:
        hf_model.loss_function = causal_lm_loss
    swapped = [*hf_model.base_model.modules(), *(() if return_logits else (hf_model,))]
    setattr(hf_model, ATTRIBUTE, config._attn_implementation)
    if (
        not config.output_attentions
    ):  # else every call wants what only eager attention has, and the config insists on it
        hf_model.set_attn_implementation(ATTENTION)
    hf_model.base_model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    for module in swapped:
        ours = SWAPS.get(type(module))
        if ours is not None and not (ours is LayerNorm and module.weight is None):
            module.__class__ = ours
    return hf_model


def restore(hf_model: _Model) -> _Model:
    """Undo `accelerate` in place and return the model: transformers' own classes, attention and loss function.

    Raises ValueError for a model that isn't accelerated, or where a wrapper was built on one of the classes here (FSDP2,
    parametrizations): take that off first. Nothing is changed then.
    """
    if not isinstance(hf_model, nn.Module) or ATTRIBUTE not in hf_model.__dict__:
        raise ValueError(f"restore takes a model that accelerate returned, got {type(hf_model).__name__}")
    for name, module in hf_model.named_modules():
        if isinstance(module, tuple(ORIGINALS)) and type(module) not in ORIGINALS:
            raise ValueError(f"{name} is a {type(module).__name__} built on fastgpt's class; take that off first")
    for module in hf_model.modules():
        module.__class__ = ORIGINALS.get(type(module), type(module))
    backbone = hf_model.base_model
    for key in [key for key, hook in backbone._forward_pre_hooks.items() if hook is _before_forward]:
        del backbone._forward_pre_hooks[key], backbone._forward_pre_hooks_with_kwargs[key]
    if hf_model.__dict__.get("_loss_function") is causal_lm_loss:
        del hf_model._loss_function
    if hf_model.config._attn_implementation == ATTENTION:  # else somebody chose another since
        hf_model.set_attn_implementation(hf_model.__dict__[ATTRIBUTE])
    delattr(hf_model, ATTRIBUTE)
    backbone.__dict__.pop(TAKEN, None)
    return hf_model


def explain(hf_model: modeling_gpt2.GPT2PreTrainedModel) -> str:
    """What attention ran on in an accelerated model's last call, and why: "kernels: first keys of padding", "torch: a mask
    with holes". Raises ValueError for a model that isn't accelerated, or wasn't called yet."""
    if not isinstance(hf_model, nn.Module) or ATTRIBUTE not in hf_model.__dict__:
        raise ValueError(f"explain takes a model that accelerate returned, got {type(hf_model).__name__}")
    taken = hf_model.base_model.__dict__.get(TAKEN)
    if taken is None:
        raise ValueError("explain tells of a model's last call, and this one wasn't called since it was accelerated")
    return taken


def _before_forward(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Checks of a GPT2Model's call; its mask as first keys; the word to its attention that the probabilities are wanted."""
    ignored = [name for name in _IGNORED if kwargs.get(name) is not None]
    if ignored:
        raise TypeError(f"transformers' GPT-2 ignores {', '.join(ignored)}, and fastgpt has no such thing")
    config = backbone.config
    given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
    _check_positions(given, config.max_position_embeddings)
    if config._attn_implementation != ATTENTION:
        taken = f"transformers: its own {config._attn_implementation} attention was chosen"
    elif kwargs.get("output_attentions"):
        taken = "transformers: its eager attention, since output_attentions asks for probabilities"
        kwargs = {**kwargs, WEIGHTS: True}
    else:
        mask, taken = first_keys(backbone, given, _keeps_keys(backbone, given))
        if mask is not given.get("attention_mask"):
            args, kwargs = (), {**given, "attention_mask": mask}
    if not torch.compiler.is_compiling():
        backbone.__dict__[TAKEN] = taken
    return args, kwargs


def _keeps_keys(backbone: Any, given: dict[str, Any]) -> bool:
    """Whether a GPT2Model's call has a cache, as transformers decides it."""
    asked = given.get("use_cache")
    asked = backbone.config.use_cache if asked is None else asked
    recomputes = getattr(backbone, "gradient_checkpointing", False) and backbone.training
    return given.get("past_key_values") is not None or bool(asked and not recomputes)


def _check_positions(given: dict[str, Any], most: int) -> None:
    """ContextLengthError for more positions than the model has, told from lengths wherever those say enough."""
    ids: Any = given.get("input_ids")
    embeddings: Any = given.get("inputs_embeds")
    past = given.get("past_key_values")
    if (ids is None) == (embeddings is None):
        return  # the model says itself what is wrong with that
    new = embeddings.shape[-2] if ids is None else ids.shape[-1]
    held = 0 if past is None else past.get_seq_length()
    if isinstance(held, Tensor):  # a static cache counts on its device, and to read that would wait for the GPU
        held = int(held) if held.device.type == "cpu" and not torch.compiler.is_compiling() else 0
    if held + new <= most:
        return
    positions = given.get("position_ids")
    if positions is not None and int(positions.max()) < most:  # padding on the left takes no positions
        return
    raise ContextLengthError(f"{held + new} positions ({held} cached, {new} new) are more than n_positions {most}")

"""What takes the place of transformers' GPT-2 modules, its attention function and its loss. The table is in the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, activations, pytorch_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.utils.generic import can_return_tuple

from fastgpt import ops
from fastgpt.plan import idle, plain

ATTENTION = "fastgpt"  # the name in transformers' registries
WEIGHTS = "fastgpt_attention_weights"  # keyword from the model's entry to the attention function


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, H, S, D] -> ([B, T, H, D], None or weights).

    attention_mask is what `sdpa_mask` makes: boolean [B, 1, T, S], or None where `causal` says all; or each query's first key as
    `masks.first_keys` gives it, int32 [B, 1, T, 1]. Keywords are transformers' and meant for any attention function, hence
    those that mean nothing here.
    """
    T, S = query.shape[2], key.shape[2]
    causal = bool(T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal))
    first: Tensor | None = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        first, attention_mask = attention_mask[:, 0, :, 0], None
    elif attention_mask is None and causal and S > T:
        # Only a fresh static cache comes without a mask: what lies behind the prompt is empty.
        key, value, S = key[:, :, :T], value[:, :, :T], T
    if kwargs.get(WEIGHTS):
        mask = _additive(attention_mask, query, S, causal)
        return modeling_gpt2.eager_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout)
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    differentiable = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if T == 1 and query.is_cuda and not differentiable and scaling in (None, query.shape[-1] ** -0.5):
        lengths = torch.full((query.shape[0],), S, dtype=torch.int32, device=query.device)
        out = ops.decode_attention(query, key, value, lengths, None if first is None else first[:, 0].contiguous())
    else:
        out = ops.attention(query, key, value, causal or first is not None, scaling, dropout, first=first)
    return out.transpose(1, 2), None


def _additive(mask: Tensor | None, query: Tensor, S: int, causal: bool) -> Tensor | None:
    """The mask that eager attention adds to its scores."""
    if mask is None and causal:
        mask = torch.ones(query.shape[2], S, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class Conv1D(pytorch_utils.Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight.t(), self.bias)


class NewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, "tanh")


class GPT2MLP(modeling_gpt2.GPT2MLP):
    # transformers' annotation of hidden_states says a tuple of tensors
    def forward(self, hidden_states: Any, residual: Tensor | None = None) -> Tensor:
        """The original's, the residual added where there is one."""
        up, down, activation = self.c_fc, self.c_proj, _ACTIVATIONS.get(type(self.act))
        if activation and plain(self.act, type(self.act)) and plain(up, Conv1D) and plain(down, Conv1D):
            weights = up.weight.t(), up.bias, down.weight.t(), down.bias
            if idle(self.dropout):
                return ops.mlp(hidden_states, *weights, activation, residual)
            y = self.dropout(ops.mlp(hidden_states, *weights, activation))
        else:
            y = super().forward(hidden_states)
        return y if residual is None else residual + y


class GPT2Block(modeling_gpt2.GPT2Block):
    def forward(
        self,
        hidden_states: Any,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        context: dict[str, Any] = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        context["use_cache"] = use_cache
        norm = self.ln_2
        if encoder_hidden_states is not None or not plain(norm, LayerNorm):
            context["encoder_hidden_states"] = encoder_hidden_states  # which the original refuses
            return super().forward(hidden_states, encoder_attention_mask=encoder_attention_mask, **context)
        attended, _ = self.attn(self.ln_1(hidden_states), **context)
        y, residual = ops.add_layer_norm(attended, hidden_states, norm.weight, norm.bias, norm.eps)
        return self.mlp(y, residual) if plain(self.mlp, GPT2MLP) else residual + self.mlp(y)


class GPT2LMHeadModel(modeling_gpt2.GPT2LMHeadModel):
    """accelerate(model, return_logits=False): in training with labels, the loss without the [B, T, V] logits."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        inputs = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
            **kwargs,
        }
        head = self.lm_head
        if labels is None or not self.training or not plain(head, nn.Linear):
            return super().forward(input_ids, labels=labels, logits_to_keep=logits_to_keep, **inputs)
        outputs = self.transformer(input_ids, **inputs)
        rows = outputs.last_hidden_state.flatten(0, -2)
        return CausalLMOutputWithCrossAttentions(
            loss=_loss(partial(ops.linear_cross_entropy, rows, head.weight, bias=head.bias), rows, labels, **kwargs),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


def causal_lm_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    """transformers' `ForCausalLMLoss` without its fp32 copy of the logits [B, T, V]: a scalar, fp32 for 16-bit logits."""
    rows = logits.reshape(-1, vocab_size)
    return _loss(partial(ops.cross_entropy, rows), rows, labels, **kwargs)


def _loss(
    entropy: Callable[..., Tensor],
    rows: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,  # whatever else the model was called with, as in transformers' own
) -> Tensor:
    """entropy of labels [B, T] shifted by one, or of shift_labels as they are; summed over num_items_in_batch where given."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(rows.device)
    if num_items_in_batch is None:
        return entropy(targets=targets, ignore_index=ignore_index, reduction="mean")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(rows.device)
    return entropy(targets=targets, ignore_index=ignore_index, reduction="sum") / num_items_in_batch


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    pytorch_utils.Conv1D: Conv1D,
    activations.NewGELUActivation: NewGELUActivation,
    modeling_gpt2.GPT2MLP: GPT2MLP,
    modeling_gpt2.GPT2Block: GPT2Block,
    modeling_gpt2.GPT2LMHeadModel: GPT2LMHeadModel,
}
ORIGINALS = {ours: theirs for theirs, ours in SWAPS.items()}
_ACTIVATIONS: dict[type[nn.Module], str] = {
    NewGELUActivation: "gelu_tanh",
    activations.GELUTanh: "gelu_tanh",
    activations.GELUActivation: "gelu",
    nn.ReLU: "relu",
}

"""Padding and packed documents as each query's first key: what transformers makes boolean masks [B, 1, T, S] of.

    call                                                     first key of query t of row b
    padding mask [B, S] of ones with zeros at its ends       the zeros on the left of row b; none anywhere: no mask
    position_ids that begin anew, no mask, no cache          where t's document begins, as `DataCollatorWithFlattening` says it
    several tokens behind a cache                            0, or the padding
    anything else                                            a mask, for torch: holes, masks [B, 1, T, S], static caches, calls
                                                             that are compiled or captured, and where no kernels run

Queries at the padding itself get other numbers than with a mask: nothing on the left, and on the right what a query there sees.
Real positions get the same. Both looks at a tensor's values are one read of the device for each new tensor, and remembered: a
Trainer's batch is looked at once, and so is each token that `generate` makes, as transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DynamicCache

from fastgpt import ops

_looked_at = WeakIdKeyDictionary()  # mask or position_ids -> (its version then, what was found)


def first_keys(backbone: Any, given: dict[str, Any], cached: bool) -> tuple[Tensor | None, str]:
    """(attention_mask to call a GPT2Model with, why), of the arguments that it was called with.

    That is int32 [B, 1, T, 1] where first keys say it, which transformers passes on as it is to `attention_forward`; None where
    every query sees all keys before it; what was given where transformers is to make a mask of it. `cached`: whether the call
    keeps its keys.
    """
    mask, past, positions = (given.get(name) for name in ("attention_mask", "past_key_values", "position_ids"))
    ids: Any = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"][..., 0]
    if ids is None or ids.dim() != 2:
        return mask, f"torch: input_ids {None if ids is None else tuple(ids.shape)}"
    implementation, why = ops.explain("attention", ids.device, backbone.dtype)
    if implementation != "triton":
        return mask, f"torch: {why}"
    if mask is None and past is None and (positions is None or cached):
        return None, "kernels: no mask"
    if torch.compiler.is_compiling() or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return mask, "torch: values can't be looked at while a call is compiled or captured"
    if not getattr(backbone.config, "is_causal", True):
        return mask, "torch: attention that isn't causal"
    if type(past) not in (DynamicCache, type(None)):
        return mask, f"torch: a {type(past).__name__}"
    held = 0 if past is None else past.get_seq_length()
    B, T = ids.shape
    first: Tensor | None = None
    if mask is None:
        if not cached and positions is not None:
            first = _documents(positions)
            why = "kernels: no mask" if first is None else "kernels: first keys of packed documents"
    elif mask.dim() != 2 or mask.shape != (B, held + T):
        return mask, f"torch: a mask of shape {tuple(mask.shape)}"
    else:
        starts = _padding(mask)
        if starts is False:
            return mask, "torch: a mask with holes"
        why = "kernels: no padding on the left" if starts is None else "kernels: first keys of padding"
        if isinstance(starts, Tensor):
            first = starts.to(ids.device)[:, None]
        elif positions is not None and not cached:  # no mask, and transformers would look for documents in them
            first = torch.zeros(B, 1, dtype=torch.int32, device=ids.device)
    if first is None:
        if T == 1 or held == 0:
            return None, why
        first, why = torch.zeros(B, 1, dtype=torch.int32, device=ids.device), "kernels: several tokens behind a cache"
    return first.expand(B, T).contiguous()[:, None, :, None], why


def _padding(mask: Tensor) -> Tensor | bool | None:
    """Zeros on the left of each row, int32 [B]; None where there are none, False where a row has two runs of ones."""

    def look() -> Tensor | bool | None:
        real = mask != 0  # what is padded on the right, no real query sees
        begins = torch.cat((real[:, :1], real[:, 1:] & ~real[:, :-1]), 1).sum(1)
        holes, none = torch.stack(((begins > 1).any(), real[:, 0].all())).tolist()
        return False if holes else None if none else (real.cumsum(1) == 0).sum(1, dtype=torch.int32)

    return _remembered(mask, look)


def _documents(positions: Tensor) -> Tensor | None:
    """Where each token's document begins, int32 [B or 1, T], as transformers tells it; None for one document a row."""

    def look() -> Tensor | None:
        begins = positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1
        if not begins.any().item():
            return None
        at = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        return torch.where(begins, at, 0).cummax(-1).values

    return _remembered(positions, look)


def _remembered(tensor: Tensor, look: Any) -> Any:
    version = None if tensor.is_inference() else tensor._version  # which tensors of inference mode don't have
    known = _looked_at.get(tensor)
    if known is None or version is None or known[0] != version:
        _looked_at[tensor] = known = version, look()
    return known[1]

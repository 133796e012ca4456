"""Adapters of low rank through Hugging Face's PEFT (https://github.com/huggingface/peft), merged where a model is saved."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

from torch import Tensor, nn

TARGETS = ("W_query", "W_key", "W_value", "out_proj")


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze the model and put adapters beside the attention's projections, in place. ValueError where PEFT isn't installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank was asked for, but peft isn't installed: pip install 'fastgpt-triton[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    # PEFT types alpha as int, and divides by it as it is.
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), target_modules=list(TARGETS))
    inject_adapter_in_model(config, model)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without adapters, each adapted weight plus its adapters' product."""
    state, merged = model.state_dict(), {}
    adapted: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    for name, tensor in state.items():
        owner = next((owner for owner in adapted if name.startswith(owner + ".")), None)
        if owner is None:
            merged[name] = tensor
        elif name.startswith(owner + ".base_layer."):
            part = name.removeprefix(owner + ".base_layer.")
            layer = adapted[owner]
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters) if part == "weight" else 0
            merged[f"{owner}.{part}"] = (tensor + delta).to(tensor.dtype) if part == "weight" else tensor
    return merged

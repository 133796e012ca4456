from __future__ import annotations

import pytest
import torch
from models import TINY, tiny_config

from fastgpt import PRESETS, GPTConfig, GPTModel
from fastgpt.config import ConfigKeyError, HeadSizeError

# facts: transformers' GPT2LMHeadModel parameter counts of the four checkpoints, and Brown et al. 2020, table 2.1
GPT2_PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
GPT3_BILLIONS = {
    "gpt3-125m": 0.125,
    "gpt3-350m": 0.356,
    "gpt3-760m": 0.760,
    "gpt3-1.3b": 1.3,
    "gpt3-2.7b": 2.7,
    "gpt3-6.7b": 6.7,
    "gpt3-13b": 13.0,
    "gpt3-175b": 175.0,
}


def test_presets_are_the_published_ones():
    assert set(PRESETS) == set(GPT2_PARAMETERS) | set(GPT3_BILLIONS)


@pytest.mark.parametrize("name", GPT2_PARAMETERS)
def test_gpt2_sizes_have_exact_parameter_counts(name):
    with torch.device("meta"):
        model = GPTModel(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == GPT2_PARAMETERS[name] == PRESETS[name].num_parameters


@pytest.mark.parametrize("name", GPT3_BILLIONS)
def test_gpt3_sizes_build_on_meta_and_round_to_the_papers_counts(name):
    with torch.device("meta"):
        model = GPTModel(PRESETS[name])
    counted = sum(p.numel() for p in model.parameters())
    assert counted == PRESETS[name].num_parameters
    assert counted / 1e9 == pytest.approx(GPT3_BILLIONS[name], rel=0.025)


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": False}, {"bias": False}, {"tie_weights": True}, {"head_bias": True}, {"vocab_multiple": 64}],
)
def test_counts_by_part_sum_to_the_models(changes):
    config = tiny_config(**changes)
    assert config.num_parameters == sum(p.numel() for p in GPTModel(config).parameters())


def test_untied_counts_are_the_books():
    # llms_from_scratch ch04 at 124M, with and without qkv_bias: facts of its own README
    book = GPTConfig(50257, 1024, 768, 12, 12, 0.1, qkv_bias=False)
    assert book.num_parameters == 163_009_536
    assert book.replace(qkv_bias=True).num_parameters == 163_037_184


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size must be from 1 to 2,097,152, got 0"),
        ({"n_layers": 10**9}, r"n_layers must be from 1 to 1,024, got 1,000,000,000"),
        ({"drop_rate": 1.5}, r"drop_rate must be from 0 to 1, got 1.5"),
        ({"attn_drop_rate": -0.1}, r"attn_drop_rate must be from 0 to 1, got -0.1"),
        ({"activation": "swish"}, r"activation must be one of .*gelu_tanh.*, got 'swish'"),
        ({"norm_position": "mid"}, r"norm_position must be one of .*, got 'mid'"),
        ({"init": "xavier"}, r"init must be one of .*, got 'xavier'"),
        ({"norm_eps": 0.0}, r"norm_eps must be a positive number, got 0.0"),
        ({"norm_eps": float("nan")}, r"norm_eps must be a positive number, got nan"),
        ({"tie_weights": True, "head_bias": True}, r"tie_weights=True has no head bias"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("value", ["12", 12.0, None, True])
def test_wrong_types_are_named(value):
    with pytest.raises(TypeError, match=r"n_layers must be int, got"):
        tiny_config(n_layers=value)


def test_width_that_does_not_divide_is_upstreams_assertion_too():
    with pytest.raises(HeadSizeError, match=r"emb_dim=30 and n_heads=4") as caught:
        GPTModel({**TINY, "emb_dim": 30})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, AssertionError)


def test_missing_and_unknown_keys_are_named():
    with pytest.raises(ConfigKeyError, match=r"lacks \['emb_dim'\]") as caught:
        GPTModel({key: value for key, value in TINY.items() if key != "emb_dim"})
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigKeyError, match=r"unknown keys \['n_head'\]"):
        GPTModel({**TINY, "n_head": 4})

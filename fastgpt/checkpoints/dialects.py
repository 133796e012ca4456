"""How other programs describe a model, and GPTConfig: transformers' config.json, nanoGPT's model_args, OpenAI's hparams.json.

    from_config_json(raw) -> config        also the book's dict of seven keys, and what fastgpt itself adds
    config_json(config) -> raw             GPT-2's where transformers computes the same, else the GPTConfig alone
    book_json(config) -> raw               the book's seven keys and the GPTConfig
    from_model_args(args) -> config        model_args(config) -> args        said_activation(state_dict) -> name or None
    from_hparams(raw) -> config

CheckpointError names the key, the value received and what was expected.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgpt.checkpoints.names import CheckpointError, differences
from fastgpt.config import REQUIRED_KEYS, GPTConfig

MAX_CONFIG_BYTES = 2**20  # a config.json is about 1 kB

GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Options of transformers' GPT2Config that change the numbers and that GPTConfig has no field for: only these values load.
GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# What a config.json and the GPTConfig under its "fastgpt" must agree on.
GPT2_SAID = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    *("activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
)
MODEL_ARGS = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "emb_dim",
    "block_size": "context_length",
    "bias": "bias",
    "vocab_size": "vocab_size",
    "dropout": "drop_rate",
}
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
}
# Fields that two descriptions of one set of weights may differ in: dropout, initial draws, padding, and biases that are zero.
FREE = {"drop_rate", "emb_drop_rate", "attn_drop_rate", "init", "vocab_multiple", "bias", "qkv_bias"}


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object of a JSON file of at most `limit` bytes."""
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors leave a byte-order mark
    except (ValueError, RecursionError) as error:  # bad bytes, bad syntax, integers of thousands of digits
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def from_config_json(raw: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a config.json: transformers' GPT-2, the book's seven keys, or what save_pretrained wrote."""
    with complaints("config.json"):
        kind, activation = raw.get("model_type", "gpt2"), raw.get("activation_function", "gelu_new")
        if kind not in ("gpt2", "fastgpt"):
            raise CheckpointError(f"config.json is of model_type {kind!r}; only 'gpt2' and 'fastgpt' load")
        if "weights" in raw:
            raise CheckpointError(
                f"config.json is of a model with {raw['weights']} weights, which GPTModel.from_pretrained alone loads"
            )
        for name, value in GPT2_FIXED.items():
            if raw.get(name, value) != value:
                raise CheckpointError(f"config.json has {name}={raw[name]!r}, which this model has no way to compute")
        if activation not in list(GPT2_ACTIVATIONS):
            raise CheckpointError(
                f"config.json has activation_function={activation!r}; known are {sorted(GPT2_ACTIVATIONS)}"
            )
        if "fastgpt" in raw or kind == "fastgpt":
            config = own_config(raw["fastgpt"], "config.json")
            said = {name: value for name, value in _gpt2_json(config).items() if name in GPT2_SAID and name in raw}
            differ = [f"{name}={raw[name]!r} beside {value!r}" for name, value in said.items() if raw[name] != value]
            if differ:
                raise CheckpointError(
                    f'config.json contradicts its own "fastgpt": {", ".join(differ)}; mend or delete that'
                )
            return config
        if "emb_dim" in raw and "n_embd" not in raw:
            return GPTConfig.from_dict({name: raw[name] for name in REQUIRED_KEYS})
        config = GPTConfig(
            vocab_size=raw["vocab_size"],
            context_length=raw["n_positions"],
            emb_dim=raw["n_embd"],
            n_heads=raw["n_head"],
            n_layers=raw["n_layer"],
            drop_rate=raw.get("resid_pdrop", 0.1),
            qkv_bias=True,
            activation=GPT2_ACTIVATIONS[activation],
            tie_weights=raw.get("tie_word_embeddings", True),
            init="gpt2",
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            emb_drop_rate=raw.get("embd_pdrop", 0.1),
            attn_drop_rate=raw.get("attn_pdrop", 0.1),
        )
        if raw.get("n_inner") not in (None, config.hidden_dim):
            raise CheckpointError(f"config.json has n_inner={raw['n_inner']!r}; only four times n_embd loads")
        return config


def config_json(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """A config.json: GPT-2's where transformers computes the same, with the GPTConfig under "fastgpt", which it ignores.

    end_of_text: the tokenizer's id of it; None is GPT-2's where the vocabulary has that, else none.
    """
    if differences(config, "gpt2"):
        return own_json(config)
    end = {} if end_of_text is None else {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    return {**_gpt2_json(config), **end, "fastgpt": config.to_dict()}


def own_json(config: GPTConfig) -> dict[str, Any]:
    """A config.json that no other program takes for a GPT-2."""
    return {"model_type": "fastgpt", "fastgpt": config.to_dict()}


def book_json(config: GPTConfig) -> dict[str, Any]:
    """A config.json that the book's GPTModel takes as its dict."""
    seven = {name: getattr(config, name) for name in REQUIRED_KEYS}
    return {**seven, **own_json(config)}


def own_config(value: Any, where: str) -> GPTConfig:
    """The GPTConfig that a file has under "fastgpt"."""
    if not isinstance(value, dict):
        raise CheckpointError(f'"fastgpt" in {where} must be an object, got {value!r}')
    with complaints(where):
        return GPTConfig.from_dict(value)


def agree(config: GPTConfig, weights: GPTConfig, where: str, names: Iterable[str] | None = None) -> None:
    """CheckpointError where the config beside some weights and the one inside them differ in a field of `names`."""
    said, kept = config.to_dict(), weights.to_dict()
    differ = [
        f"{name}={said[name]!r}, the weights {kept[name]!r}"
        for name in (said if names is None else names)
        if name not in FREE and said[name] != kept[name]
    ]
    if differ:
        raise CheckpointError(f"{where} and the weights are of different saves: {where} has {'; '.join(differ)}")


def from_model_args(args: Any, own: Any = None, activation: str | None = None) -> GPTConfig:
    """The GPTConfig of nanoGPT's model_args (tied head, exact GELU unless told); `own` is what fastgpt keeps beside them."""
    if not isinstance(args, dict):
        raise CheckpointError(f"model_args must be a dict, got {type(args).__name__}")
    unknown = [name for name in args if name not in (*MODEL_ARGS, "activation")]
    if unknown:
        raise CheckpointError(f"model_args has unknown keys {unknown[:9]}; known are {sorted(MODEL_ARGS)}")
    args = {"bias": True, "dropout": 0.0, "activation": "gelu", **args}
    with complaints("model_args"):
        values = {ours: args[theirs] for theirs, ours in MODEL_ARGS.items()}
        activation = activation or args["activation"]
        config = GPTConfig(**values, qkv_bias=args["bias"], activation=activation, tie_weights=True, init="gpt2")
    if own is None:
        return config
    exact = own_config(own, "the checkpoint")
    agree(exact, config, 'its "fastgpt"', MODEL_ARGS.values())
    return exact


def said_activation(state_dict: Any) -> str | None:
    """The activation that fastgpt.compat.nanogpt notes in a state dict's metadata, where model_args has no place for it."""
    metadata = getattr(state_dict, "_metadata", None)
    for name in ("", "_orig_mod"):  # torch.compile's prefix, which users strip from the names alone
        entry = metadata.get(name) if isinstance(metadata, dict) else None
        if isinstance(entry, dict) and isinstance(entry.get("activation"), str):
            return entry["activation"]
    return None


def model_args(config: GPTConfig) -> dict[str, Any]:
    """nanoGPT's model_args; its `bias` is all or nothing."""
    args = {theirs: getattr(config, ours) for theirs, ours in MODEL_ARGS.items()}
    return args | {"bias": config.bias or config.qkv_bias}


def from_hparams(raw: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of OpenAI's hparams.json."""
    with complaints("hparams.json"):
        values = {ours: raw[theirs] for theirs, ours in HPARAMS.items()}
        return GPTConfig(**values, drop_rate=0.1, qkv_bias=True, tie_weights=True, init="gpt2")


@contextlib.contextmanager
def complaints(where: str) -> Iterator[None]:
    """What a bad value raises, as a CheckpointError that says where the value stands."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        if isinstance(error, ValueError):  # a ConfigKeyError, which says it all
            raise CheckpointError(f"{where}: {error}") from error
        raise CheckpointError(f"{where} lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _gpt2_json(config: GPTConfig) -> dict[str, Any]:
    activation = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}[config.activation]
    end_of_text = 50256 if config.vocab_size > 50256 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "activation_function": activation,
        "resid_pdrop": config.drop_rate,
        "embd_pdrop": config.drop_rate if config.emb_drop_rate is None else config.emb_drop_rate,
        "attn_pdrop": config.drop_rate if config.attn_drop_rate is None else config.attn_drop_rate,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }

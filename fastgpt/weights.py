"""Checkpoints to state dicts and back. Knows a model by its config alone.

Two layouts of a directory with config.json and model.safetensors (or model.safetensors.index.json and its shards):

    gpt2      transformers' GPT-2, which vLLM serves too: names with or without `transformer.`, lm_head optional, stray mask
              buffers ignored. Linear weights are stored transposed ([in, out], `Conv1D`), queries, keys and values side by side.
    fastgpt   GPTModel's own names, for what GPT-2's layout can't say (post-norm, a head bias, non-causal attention).

Everything is checked against the config before a tensor is read, and every mismatch is listed. Only safetensors files are opened:
nothing in a checkpoint is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.files import atomic_write, write_text

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
BUNDLED = Path(__file__).parent / "assets"
MAX_CONFIG_BYTES = 2**20  # a config.json is about 1 kB
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# GPT-2 name -> (ours, how): "copy" as it is, "T" transposed, "qkv" and "qkv T" three of ours side by side on the last dimension.
# {i} is the layer. Shapes and orientation: facts of transformers' modeling_gpt2.py and of
# https://github.com/rasbt/LLMs-from-scratch, ch05 (load_weights_into_gpt).
_QKV = ("W_query", "W_key", "W_value")
GPT2_TOP = {
    "wte.weight": ("tok_emb.weight", "copy"),
    "wpe.weight": ("pos_emb.weight", "copy"),
    "ln_f.weight": ("final_norm.scale", "copy"),
    "ln_f.bias": ("final_norm.shift", "copy"),
    "lm_head.weight": ("out_head.weight", "copy"),
}
GPT2_LAYER = {
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
PADDED = ("tok_emb.weight", "out_head.weight", "out_head.bias")  # rows: padded_vocab_size in a model, vocab_size here
GPT2_IGNORED = (".attn.bias", ".attn.masked_bias")  # causal mask buffers of older transformers
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Options of transformers' GPT2Config that change the numbers and that GPTConfig has no field for: only these values load.
GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
# What a config.json and the GPTConfig under its "fastgpt" must agree on.
GPT2_SAID = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    *("activation_function", "layer_norm_epsilon", "tie_word_embeddings"),
)


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded; the message lists everything that is wrong with it."""


def load_pretrained(source: str | os.PathLike[str], revision: str | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """(config, GPTModel state dict with vocab_size rows) of a directory, a .safetensors file, "bundled", or a hub name.

    A tied model's dict has no out_head.weight. Tensors are copies in the file's dtype.
    """
    directory, files = _locate(source, revision)
    raw = _read_json(directory / "config.json") if (directory / "config.json").is_file() else None
    with contextlib.ExitStack() as stack:
        try:
            handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            where = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            slices = {name: handle.get_slice(name) for name, handle in where.items()}
            shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            dtypes = {name: piece.get_dtype() for name, piece in slices.items()}
            config = _config(raw, shapes, (handles[0].metadata() or {}) if handles else {})
            plan = _plan(config, shapes, dtypes)
            tensors: dict[str, Tensor] = {}
            for theirs, ours, how in plan:
                tensors.update(_to_ours(where[theirs].get_tensor(theirs), ours, how))
        except SafetensorError as error:
            raise CheckpointError(f"{', '.join(map(str, files))}: not a whole safetensors file: {error}") from error
    _drop_redundant(config, tensors)
    return config, tensors


def _drop_redundant(config: GPTConfig, tensors: dict[str, Tensor]) -> None:
    """Remove what GPT-2's layout has and this config doesn't, after a look that nothing is lost with it."""
    redundant = sorted(absent_biases(config) & set(tensors))
    lost = [f"{name} isn't zero, and the config has no such bias" for name in redundant if tensors.pop(name).any()]
    head = tensors.pop("out_head.weight") if config.tie_weights and "out_head.weight" in tensors else None
    if head is not None and not _same(head, tensors["tok_emb.weight"]):
        lost.append("the head differs from the token embedding, and the config says that they are one (tied)")
    if lost:
        raise CheckpointError("the config leaves out weights that the checkpoint has:\n  " + "\n  ".join(lost))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.allclose(a.to(b.dtype), b, rtol=0.0, atol=0.0, equal_nan=True)


def padded(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The state dict as the module wants it: rows padded with zeros to padded_vocab_size, a tied head under both names."""
    out = dict(tensors)
    extra = config.padded_vocab_size - config.vocab_size
    if extra:
        for name in PADDED:
            if name in out:
                out[name] = torch.cat((out[name], out[name].new_zeros(extra, *out[name].shape[1:])))
    if config.tie_weights:
        out["out_head.weight"] = out["tok_emb.weight"]
    return out


def save_pretrained(
    config: GPTConfig,
    state_dict: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write model.safetensors and config.json. GPT-2's layout where it can say what the config says, else GPTModel's own names.

    A GPT-2 config.json also carries the GPTConfig under "fastgpt" (transformers ignores it), so that loading here is exact.
    """
    directory = Path(directory)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {list(DTYPES.values())}, got {dtype}")
    wanted = expected_shapes(config)
    allowed = wanted | ({"out_head.weight": wanted["tok_emb.weight"]} if config.tie_weights else {})
    problems = [f"{name} is missing" for name in wanted if name not in state_dict]
    problems += [f"{name} has no place" for name in state_dict if name not in allowed]
    for name, shape in allowed.items():
        rows = config.padded_vocab_size if name in PADDED else shape[0]
        if name in state_dict and tuple(state_dict[name].shape) not in (shape, (rows, *shape[1:])):
            problems.append(f"{name} is {list(state_dict[name].shape)}, not {list(shape)}")
        elif name in state_dict and state_dict[name].dtype not in DTYPES.values():
            problems.append(f"{name} has dtype {state_dict[name].dtype}, not one of {list(DTYPES.values())}")
    V, head = config.vocab_size, state_dict.get("out_head.weight") if config.tie_weights and not problems else None
    if head is not None and not _same(head[:V], state_dict["tok_emb.weight"][:V]):
        problems.append("out_head.weight differs from tok_emb.weight, and the config says that they are one (tied)")
    if problems:
        raise ValueError(
            f"the state dict isn't that of a GPTModel of this config in {len(problems)} places; fold or remove swapped "
            "modules, or save them by torch.save:\n  " + "\n  ".join(problems)
        )
    tensors = {
        name: state_dict[name].detach()[: shape[0]].to(device="cpu", dtype=dtype) for name, shape in wanted.items()
    }
    if fits_gpt2(config):
        tensors, settings = _to_gpt2(config, tensors), _gpt2_settings(config)
    else:
        settings = {"model_type": "fastgpt", "fastgpt": config.to_dict()}
    metadata = {"format": "pt", "fastgpt": json.dumps(config.to_dict())}
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    atomic_write(directory / "model.safetensors", lambda path: save_file(contiguous, path, metadata=metadata))
    write_text(directory / "config.json", json.dumps(settings, indent=2) + "\n")


def expected_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every name of a checkpoint of this config with its shape; vocab_size rows, a tied head once."""
    C, H, V = config.emb_dim, config.hidden_dim, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (V, C), "pos_emb.weight": (config.context_length, C)}
    for i in range(config.n_layers):
        block = f"trf_blocks.{i}."
        for name in _QKV:
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
    """Biases that GPT-2's layout has and a model of this config doesn't: stored there as zeros, dropped on the way back."""
    names = {f"trf_blocks.{i}.att.{name}.bias" for i in range(config.n_layers) for name in _QKV if not config.qkv_bias}
    if config.bias:
        return names
    parts = ("att.out_proj.bias", "ff.layers.0.bias", "ff.layers.2.bias", "norm1.shift", "norm2.shift")
    return names | {f"trf_blocks.{i}.{part}" for i in range(config.n_layers) for part in parts} | {"final_norm.shift"}


def fits_gpt2(config: GPTConfig) -> bool:
    """Whether transformers' GPT-2 computes the same function."""
    return config.norm_position == "pre" and config.causal and not config.head_bias


def _locate(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, list[Path]]:
    """The directory of config.json, and the safetensors files."""
    path = BUNDLED if str(source) == "bundled" else Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a .safetensors file; only those are opened, since others can run code"
            )
        return path.parent, [path]
    if not path.is_dir():
        path = _download(str(source), revision)
    if (path / "model.safetensors").is_file():
        return path, [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{path} has no model.safetensors, nor its .index.json; other formats can run code")
    weight_map = _read_json(index, limit=2**26).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names a shard outside its own directory: {name!r}")
        if not (path / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which isn't there")
    return path, [path / name for name in names]


def _download(name: str, revision: str | None) -> Path:
    import importlib.util

    known = f'a directory, a .safetensors file, "bundled", one of {sorted(HUB_NAMES)}, or owner/name on the Hugging Face hub'
    if name not in HUB_NAMES and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no model at {name!r}; expected {known}")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name!r} is no local path, and the hub needs huggingface_hub: pip install 'fastgpt-triton[hub]'"
        )
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            HUB_NAMES.get(name, name),
            revision=revision,
            allow_patterns=["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
        )
    except Exception as error:  # the client raises a dozen unrelated types for "not reachable"
        raise CheckpointError(f"{name!r} is no local path and could not be fetched from the hub: {error}") from error
    return Path(found)


def _read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {limit:,} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad bytes, bad syntax, integers of thousands of digits
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _config(
    raw: dict[str, Any] | None, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
) -> GPTConfig:
    """The GPTConfig of a config.json, of a file's own metadata, or, for a bare GPT-2 file, of its shapes."""
    try:
        if raw is None and "fastgpt" in metadata:
            raw = {"fastgpt": json.loads(metadata["fastgpt"])}
        if raw is None:
            return _infer(shapes)
        kind, activation = raw.get("model_type", "gpt2"), raw.get("activation_function", "gelu_new")
        if kind not in ("gpt2", "fastgpt"):
            raise CheckpointError(f"config.json is of model_type {kind!r}; only 'gpt2' and 'fastgpt' load")
        for name, value in GPT2_FIXED.items():
            if raw.get(name, value) != value:
                raise CheckpointError(f"config.json has {name}={raw[name]!r}, which this model has no way to compute")
        if activation not in list(GPT2_ACTIVATIONS):
            raise CheckpointError(
                f"config.json has activation_function={activation!r}; known are {sorted(GPT2_ACTIVATIONS)}"
            )
        if "fastgpt" in raw or kind == "fastgpt":
            if not isinstance(raw["fastgpt"], dict):
                raise CheckpointError(f'"fastgpt" in config.json must be an object, got {raw["fastgpt"]!r}')
            config = GPTConfig.from_dict(raw["fastgpt"])
            said = {name: value for name, value in _gpt2_settings(config).items() if name in GPT2_SAID and name in raw}
            differ = [f"{name}={raw[name]!r} beside {value!r}" for name, value in said.items() if raw[name] != value]
            if differ:
                raise CheckpointError(
                    f'config.json contradicts its own "fastgpt": {", ".join(differ)}; mend or delete that'
                )
            return config
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
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]!r}") from error


def _infer(shapes: Mapping[str, tuple[int, ...]]) -> GPTConfig:
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    if len(bare.get("wte.weight", ())) != 2 or len(bare.get("wpe.weight", ())) != 2:
        raise CheckpointError("there is no config.json, and the names are not GPT-2's, so the sizes can't be told")
    V, C = bare["wte.weight"]
    layers = len({name.split(".")[1] for name in bare if name.startswith("h.")})
    if C % 64:
        raise CheckpointError(
            f"there is no config.json, and width {C} isn't made of GPT-2's heads of 64; put config.json beside the file"
        )
    tied = "lm_head.weight" not in bare
    return GPTConfig(V, bare["wpe.weight"][0], C, C // 64, layers, 0.1, True, tie_weights=tied, init="gpt2")


def _gpt2_names(config: GPTConfig) -> list[tuple[str, str, str]]:
    """(GPT-2 name without prefix, ours, how) of everything that a GPT-2 checkpoint of this config holds."""
    names = [
        (theirs, ours, how)
        for theirs, (ours, how) in GPT2_TOP.items()
        if theirs != "lm_head.weight" or not config.tie_weights
    ]
    for i in range(config.n_layers):
        names += [
            (theirs.replace("{i}", str(i)), ours.replace("{i}", str(i)), how)
            for theirs, (ours, how) in GPT2_LAYER.items()
        ]
    return names


def _plan(
    config: GPTConfig, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """(name in the file, ours, how) for every tensor to read; CheckpointError with every mismatch."""
    # A tied head may be there too; it is read, so that `_drop_redundant` can tell whether it is the same.
    head = config.replace(tie_weights=config.tie_weights and not {"out_head.weight", "lm_head.weight"} & set(shapes))
    if "tok_emb.weight" in shapes:
        wanted = expected_shapes(head)
        plan = [(name, name, "copy") for name in wanted]
        ignored = {name for name in shapes if name.endswith(".att.mask")}
    else:
        prefix = "transformer." if any(name.startswith("transformer.") for name in shapes) else ""
        full = expected_shapes(head.replace(bias=True, qkv_bias=True))
        plan, wanted = [], {}
        for theirs, ours, how in _gpt2_names(head):
            name = theirs if theirs == "lm_head.weight" else prefix + theirs
            plan.append((name, ours, how))
            wanted[name] = _their_shape(full, ours, how)
        ignored = {name for name in shapes if name.endswith(GPT2_IGNORED)}
    problems = [f"missing {name} {list(wanted[name])}" for name in wanted if name not in shapes]
    problems += [
        f"unknown {name} {list(shapes[name])}" for name in shapes if name not in wanted and name not in ignored
    ]
    for name in wanted:
        if name in shapes and shapes[name] != wanted[name]:
            problems.append(f"{name} is {list(shapes[name])}, the config says {list(wanted[name])}")
        if name in shapes and dtypes[name] not in DTYPES:
            problems.append(f"{name} has dtype {dtypes[name]}, expected one of {list(DTYPES)}")
    if problems:
        raise CheckpointError(
            f"the checkpoint doesn't match its config in {len(problems)} places:\n  " + "\n  ".join(problems)
        )
    return plan


def _their_shape(full: Mapping[str, tuple[int, ...]], ours: str, how: str) -> tuple[int, ...]:
    shape = full[ours.replace("{qkv}", _QKV[0])]
    shape = shape[::-1] if "T" in how else shape
    return (*shape[:-1], 3 * shape[-1]) if "qkv" in how else shape


def _to_ours(tensor: Tensor, ours: str, how: str) -> dict[str, Tensor]:
    # A clone, since what safetensors gives is a view of the mapped file, which would change under the model.
    if "qkv" in how:
        pieces = dict(zip(_QKV, tensor.chunk(3, dim=-1), strict=True))
        return {ours.replace("{qkv}", name): _oriented(piece, how) for name, piece in pieces.items()}
    return {ours: _oriented(tensor, how)}


def _oriented(tensor: Tensor, how: str) -> Tensor:
    return (tensor.T if "T" in how else tensor).clone(memory_format=torch.contiguous_format)


def _to_gpt2(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    full = dict(tensors)
    shapes = expected_shapes(config.replace(bias=True, qkv_bias=True))
    for name in absent_biases(config):
        full[name] = torch.zeros(shapes[name], dtype=tensors["tok_emb.weight"].dtype)
    out = {}
    for theirs, ours, how in _gpt2_names(config):
        if "qkv" in how:
            pieces = [full[ours.replace("{qkv}", name)] for name in _QKV]
            tensor = torch.cat([piece.T if "T" in how else piece for piece in pieces], dim=-1)
        else:
            tensor = full[ours].T if "T" in how else full[ours]
        out[theirs if theirs == "lm_head.weight" else "transformer." + theirs] = tensor
    return out


def _gpt2_settings(config: GPTConfig) -> dict[str, Any]:
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
        "fastgpt": dataclasses.asdict(config),
    }

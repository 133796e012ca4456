"""State dicts in memory from one layout of fastgpt.checkpoints.names to another.

    from_layout(state_dict, config=None, layout=None) -> (config, GPTModel's state dict)
    to_layout(config, state_dict, layout, masks=False) -> state dict of that layout
    from_params(params, n_heads=None) -> (config, state dict)     the book's `params` tree of numpy arrays
    to_params(config, state_dict) -> params
    infer(shapes, layout) -> config                               what shapes tell, for want of a config
    differences(config, layout) -> {field: value}                 what the layout's program would compute otherwise
    padded(tensors, config) -> what GPTModel.load_state_dict wants

A GPTModel state dict in here has vocab_size rows (GPTModel's own may have padded_vocab_size; the rest is cut off) and a tied
model's has no out_head.weight. What comes out shares memory with what went in wherever that is possible. Everything is
checked before anything is made, and every mismatch is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoints.names import (
    DTYPE_NAMES,
    DTYPES,
    HEADS,
    LAYOUTS,
    PADDED,
    QKV,
    CheckpointError,
    Plan,
    Shapes,
    absent_biases,
    detect,
    differences,
    dtype_name,
    expected_shapes,
    known,
    names_of,
    stored_config,
    their_shape,
    unwrapped,
)
from fastgpt.config import GPTConfig

__all__ = [
    "checked",
    "differences",
    "from_layout",
    "from_params",
    "infer",
    "padded",
    "pieces",
    "plan",
    "settle",
    "to_layout",
    "to_params",
    "widened",
]


def infer(shapes: Shapes, layout: str, n_heads: int | None = None, activation: str | None = None) -> GPTConfig:
    """The config that unwrapped names and shapes tell. Without n_heads, heads are 64 wide, as in every GPT-2 and in the book.

    CheckpointError where something can't be told: a width that isn't made of such heads; the activation of nanoGPT's names,
    which nanoGPT (exact GELU), minGPT and llm.c (tanh) share.
    """
    prefix = LAYOUTS[layout].prefix
    bare = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    theirs = {ours: name for name, (ours, _) in (LAYOUTS[layout].top | LAYOUTS[layout].layer).items()}
    tokens, positions = (bare.get(theirs[name], ()) for name in ("tok_emb.weight", "pos_emb.weight"))
    if len(tokens) != 2 or len(positions) != 2:
        raise CheckpointError("there is no config, and without token and position embeddings the sizes can't be told")
    (V, C), T = tokens, positions[0]
    if n_heads is None and C % 64:
        raise CheckpointError(
            f"there is no config, and width {C} isn't made of GPT-2's heads of 64; put config.json beside the file"
        )
    if layout == "nanogpt" and activation is None:
        raise CheckpointError(
            "there is no config, and the names are both nanoGPT's, which computes the exact GELU, and minGPT's and llm.c's, "
            'which compute the tanh form; put config.json beside the file, with the GPTConfig under "fastgpt"'
        )
    layers = 0
    while theirs["trf_blocks.{i}.norm1.scale"].replace("{i}", str(layers)) in bare:
        layers += 1
    qkv_bias = theirs.get("trf_blocks.{i}.att.{qkv}.bias") or theirs["trf_blocks.{i}.att.W_query.bias"]
    return GPTConfig(
        *(V, T, C, C // 64 if n_heads is None else n_heads, layers, 0.1),
        qkv_bias=qkv_bias.replace("{i}", "0") in bare,
        bias=theirs["final_norm.shift"] in bare,
        head_bias="out_head.bias" in bare,
        tie_weights=not any(name in bare for name in HEADS),
        activation=activation or "gelu_tanh",
        init="torch" if layout in ("fastgpt", "llms-from-scratch", "llms-from-scratch-fast") else "gpt2",
    )


def plan(config: GPTConfig, shapes: Shapes, dtypes: Mapping[str, str], layout: str) -> Plan:
    """(unwrapped name, ours, how) for every tensor to read. CheckpointError with every mismatch; nothing is read for it."""
    form = LAYOUTS[layout]
    # What the config says is not there may be there all the same: a tied head, zero biases. It is read, so that `settle` can
    # tell whether anything is lost with it.
    stored = stored_config(config, layout)
    if form.biases == "own":
        stored = stored.replace(
            bias=stored.bias or "final_norm.shift" in shapes,
            qkv_bias=stored.qkv_bias or "trf_blocks.0.att.W_query.bias" in shapes,
        )
    stored = stored.replace(tie_weights=config.tie_weights and not any(head in shapes for head in HEADS))
    prefix = form.prefix if any(name.startswith(form.prefix) for name in shapes) else ""
    full = expected_shapes(stored)
    steps = [
        (theirs if theirs in HEADS else prefix + theirs, ours, how) for theirs, ours, how in names_of(stored, layout)
    ]
    wanted = {theirs: their_shape(full, ours, how) for theirs, ours, how in steps}
    ignored = {name for name in shapes if form.ignored and name.endswith(form.ignored) and name not in wanted}
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
    return steps


def pieces(tensor: Tensor, ours: str, how: str) -> dict[str, Tensor]:
    """Views of one of their tensors under our names."""
    tensor = tensor.T if "T" in how else tensor
    if "qkv" not in how:
        return {ours: tensor}
    return {ours.replace("{qkv}", name): piece for name, piece in zip(QKV, tensor.chunk(3), strict=True)}


def settle(config: GPTConfig, tensors: dict[str, Tensor]) -> None:
    """Remove what the layout has and this config doesn't, after a look that nothing is lost with it."""
    redundant = sorted(absent_biases(config) & set(tensors))
    lost = [f"{name} isn't zero, and the config has no such bias" for name in redundant if tensors.pop(name).any()]
    head = tensors.pop("out_head.weight") if config.tie_weights and "out_head.weight" in tensors else None
    if head is not None and not same(head, tensors["tok_emb.weight"]):
        lost.append("the head differs from the token embedding, and the config says that they are one (tied)")
    if lost:
        raise CheckpointError("the config leaves out weights that the checkpoint has:\n  " + "\n  ".join(lost))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN being itself."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.data_ptr() == b.data_ptr() or torch.allclose(a.to(wide), b.to(wide), rtol=0.0, atol=0.0, equal_nan=True)


def from_layout(
    state_dict: Mapping[str, Tensor], config: GPTConfig | None = None, layout: str | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """(config, GPTModel's state dict) of a state dict in any layout; wrappers' prefixes and causal masks are left out.

    Args:
        config: what the model is; inferred from the shapes where that is possible (see `infer`).
        layout: a name of LAYOUTS; detected when left out.

    The tensors are views of those that came in, so that linear weights may be strided. CheckpointError lists every mismatch.
    """
    names = unwrapped(state_dict)
    shapes = {short: tuple(state_dict[name].shape) for short, name in names.items()}
    dtypes = {short: dtype_name(state_dict[name].dtype) for short, name in names.items()}
    layout = detect(shapes) if layout is None else known(layout)
    config = infer(shapes, layout) if config is None else config
    tensors: dict[str, Tensor] = {}
    for theirs, ours, how in plan(config, shapes, dtypes, layout):
        tensors |= pieces(state_dict[names[theirs]].detach(), ours, how)
    settle(config, tensors)
    return config, tensors


def to_layout(
    config: GPTConfig, state_dict: Mapping[str, Tensor], layout: str, masks: bool = False
) -> dict[str, Tensor]:
    """GPTModel's state dict in a layout, with zeros for biases that only the layout has.

    Args:
        state_dict: GPTModel's, tied head under both names or one, vocab_size or padded_vocab_size rows.
        masks: with the book's `att.mask` buffers, one storage for all of them.

    Raises ValueError where the state dict isn't this config's, or has what the layout has no name for (a head bias, OpenAI's
    untied head). Whether the layout's program computes the same from it is another question: see `differences`.
    """
    form = LAYOUTS[known(layout)]
    if masks and layout not in ("fastgpt", "llms-from-scratch"):
        raise ValueError(f"only the book's layout has masks, got masks=True with layout={layout!r}")
    tensors = checked(config, state_dict)
    stored = stored_config(config, layout)
    named = {ours for ours, _ in form.top.values()}
    homeless = [name for name in ("out_head.weight", "out_head.bias") if name in tensors and name not in named]
    if homeless:
        raise ValueError(f"layout {layout!r} has no name for {' and '.join(homeless)}")
    zero = tensors["tok_emb.weight"]
    for name, shape in expected_shapes(stored).items():
        if name not in tensors:
            tensors[name] = zero.new_zeros(shape)
    if config.tie_weights and form.head:
        tensors["out_head.weight"] = zero
        stored = stored.replace(tie_weights=False)
    mask = zero.new_ones(config.context_length, config.context_length).triu(1) if masks else None
    out: dict[str, Tensor] = {}
    for theirs, ours, how in names_of(stored, layout):
        if mask is not None and theirs.endswith("att.W_query.weight"):  # where the book's module has it
            out[theirs.replace("W_query.weight", "mask")] = mask
        three = [tensors[ours.replace("{qkv}", name)] for name in QKV] if "qkv" in how else [tensors[ours]]
        tensor = three[0] if len(three) == 1 else torch.cat(three)
        out[theirs if theirs in HEADS else form.prefix + theirs] = tensor.T if "T" in how else tensor
    return out


def checked(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPTModel's state dict with vocab_size rows and a tied head once. ValueError with all that isn't as the config says."""
    wanted = expected_shapes(config)
    allowed = wanted | ({"out_head.weight": wanted["tok_emb.weight"]} if config.tie_weights else {})
    problems = [f"{name} is missing" for name in wanted if name not in state_dict]
    problems += [
        f"{name} has no place" for name in state_dict if name not in allowed and not name.endswith(".att.mask")
    ]
    for name, shape in allowed.items():
        rows = config.padded_vocab_size if name in PADDED else shape[0]
        if name in state_dict and tuple(state_dict[name].shape) not in (shape, (rows, *shape[1:])):
            problems.append(f"{name} is {list(state_dict[name].shape)}, not {list(shape)}")
        elif name in state_dict and state_dict[name].dtype not in DTYPE_NAMES:
            problems.append(f"{name} has dtype {state_dict[name].dtype}, not one of {list(DTYPES.values())}")
    V, head = config.vocab_size, state_dict.get("out_head.weight") if config.tie_weights and not problems else None
    if head is not None and not same(head[:V], state_dict["tok_emb.weight"][:V]):
        problems.append("out_head.weight differs from tok_emb.weight, and the config says that they are one (tied)")
    if problems:
        raise ValueError(
            f"the state dict isn't that of a GPTModel of this config in {len(problems)} places; fold or remove swapped "
            "modules, or save them by torch.save:\n  " + "\n  ".join(problems)
        )
    return {name: state_dict[name].detach()[: shape[0]] for name, shape in wanted.items()}


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


def widened(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """In `dtype`, or each in its own, but 16-bit ones in fp32: what from_pretrained gives a model."""
    half = (torch.float16, torch.bfloat16)
    return {
        name: tensor.to(dtype or (torch.float32 if tensor.dtype in half else tensor.dtype))
        for name, tensor in tensors.items()
    }


def from_params(params: Mapping[str, Any], n_heads: int | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """(config, GPTModel's state dict) of the book's `params`: a tree of numpy arrays as OpenAI's checkpoint has them.

    Without n_heads, heads are 64 wide. The tensors share the arrays' memory. CheckpointError as `from_layout`.
    """
    flat: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for name, child in node.items():
                walk(child, f"{path}/{name}" if path else str(name))
        elif isinstance(node, (list, tuple)) and path == "blocks":
            for i, child in enumerate(node):
                walk(child, f"h{i}")
        else:
            flat[{"g": "ln_f/g", "b": "ln_f/b"}.get(path, path)] = torch.as_tensor(node)

    walk(params, "")
    config = infer({name: tuple(tensor.shape) for name, tensor in flat.items()}, "openai", n_heads)
    return from_layout(flat, config, "openai")


def to_params(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The book's `params` tree of a tied model, for its load_weights_into_gpt. 16-bit weights become fp32.

    ValueError as `to_layout`.
    """
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.n_layers)]}
    for name, tensor in to_layout(config, state_dict, "openai").items():
        *path, last = name.split("/")
        node = params
        if path and path[0] != "ln_f":
            node = params["blocks"][int(path[0][1:])]
            for part in path[1:]:
                node = node.setdefault(part, {})
        wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        node[last] = wide.cpu().numpy()
    return params

"""Other programs' checkpoint files, written and read afresh from their descriptions with struct and numpy, as oracles.

llm.c: https://github.com/karpathy/llm.c/blob/master/train_gpt2.py (MIT) says which numbers come in which order. TensorFlow:
https://github.com/google/leveldb/blob/main/doc/table_format.md and tensor_bundle.proto. Neither shares code with fastgpt.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def gpt2_arrays(model: torch.nn.Module, linear: bool) -> dict[str, np.ndarray]:
    """GPT-2 name -> array of transformers' GPT2LMHeadModel; linear: matrices as nn.Linear has them, [out, in]."""
    out = {}
    for name, tensor in model.transformer.state_dict().items():
        matrix = ".attn.c_" in name or ".mlp.c_" in name
        array = tensor.detach().float().numpy()
        out[name] = np.ascontiguousarray(array.T) if linear and matrix and array.ndim == 2 else array
    return out


def bf16(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest even."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def from_bf16(halves: np.ndarray) -> np.ndarray:
    return (halves.astype("<u4") << 16).view("<f4")


def write_llmc(path: Path, arrays: dict[str, np.ndarray], heads: int, version: int) -> None:
    V, C = arrays["wte.weight"].shape
    T = arrays["wpe.weight"].shape[0]
    layers = sum(name.endswith("ln_1.weight") for name in arrays)
    rows = (V + 127) // 128 * 128
    header = np.zeros(256, dtype="<i4")
    header[:8] = [20240326, version, T, V, layers, heads, C, rows]
    table = np.concatenate([arrays["wte.weight"], np.zeros((rows - V, C), dtype=np.float32)])
    parts = [table, arrays["wpe.weight"]]
    for block in BLOCK:
        for kind in ("weight", "bias"):
            parts += [arrays[f"h.{i}.{block}.{kind}"] for i in range(layers)]
    parts += [arrays["ln_f.weight"], arrays["ln_f.bias"]]
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for part in parts:
            file.write(part.astype("<f4").tobytes() if version == 3 else bf16(part).tobytes())


def read_llmc(path: Path) -> tuple[list[int], dict[str, np.ndarray]]:
    """(first eight numbers of the header, arrays with all padded rows; of bf16 files as float32)."""
    data = path.read_bytes()
    head = list(struct.unpack_from("<8i", data))
    _, version, T, _, L, _, C, rows = head
    numbers = np.frombuffer(data[1024:], dtype="<f4" if version == 3 else "<u2")
    numbers = numbers if version == 3 else from_bf16(numbers)
    kinds = {"wte.weight": (rows, C), "wpe.weight": (T, C)}
    widths = {"ln_1": C, "attn.c_attn": 3 * C, "attn.c_proj": C, "ln_2": C, "mlp.c_fc": 4 * C, "mlp.c_proj": C}
    for block, width in widths.items():
        inner = 4 * C if block == "mlp.c_proj" else C
        kinds[f"{block}.weight"] = (L, width) if block.startswith("ln") else (L, width, inner)
        kinds[f"{block}.bias"] = (L, width)
    kinds |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    out, at = {}, 0
    for kind, shape in kinds.items():
        stack = numbers[at : at + int(np.prod(shape))].reshape(shape)
        at += stack.size
        if kind.startswith(("wte", "wpe", "ln_f")):
            out[kind] = stack
        else:
            out |= {f"h.{i}.{kind}": stack[i] for i in range(L)}
    assert at == numbers.size
    return head, out


# TensorFlow


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def crc32c(data: bytes) -> int:
    """Bit by bit: the polynomial 0x1EDC6F41, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def block(entries: list[tuple[bytes, bytes]], compression: int = 0, restart_every: int = 16) -> bytes:
    """A table's block with its trailer; keys share their first bytes with the key before, except at restarts."""
    body, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_every == 0:
            restarts.append(len(body))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    body += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    crc = crc32c(body + bytes([compression]))
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    return body + bytes([compression]) + struct.pack("<I", masked)


def table(entries: list[tuple[bytes, bytes]], per_block: int = 7, compression: int = 0) -> bytes:
    data, places = b"", []
    for i in range(0, len(entries), per_block):
        part = block(entries[i : i + per_block], compression, restart_every=3)
        places.append((entries[min(i + per_block, len(entries)) - 1][0], varint(len(data)) + varint(len(part) - 5)))
        data += part
    meta = block([])
    meta_place = varint(len(data)) + varint(len(meta) - 5)
    data += meta
    index = block(places, restart_every=1)
    index_place = varint(len(data)) + varint(len(index) - 5)
    footer = (meta_place + index_place).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return data + index + footer


TF_DTYPES = {torch.float32: 1, torch.float64: 2, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}


def write_bundle(prefix: Path, variables: dict[str, Tensor], compression: int = 0) -> None:
    """prefix.index and prefix.data-00000-of-00001, as TensorFlow's saver lays them out."""
    entries = {b"": field(1, 1) + field(3, field(1, 1))}
    data = b""
    for name, tensor in sorted(variables.items()):
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
        entry = field(1, TF_DTYPES[tensor.dtype]) + field(2, shape)
        entry += (field(4, len(data)) if data else b"") + field(5, len(content))
        entries[name.encode()] = entry + varint(6 * 8 + 5) + struct.pack("<I", crc32c(content[:64]))
        data += content
    Path(f"{prefix}.index").write_bytes(table(sorted(entries.items()), compression=compression))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def openai_variables(model: torch.nn.Module) -> dict[str, Tensor]:
    """transformers' GPT-2 as OpenAI's graph names and shapes it: model/h0/attn/c_attn/w is [1, in, out]."""
    out = {}
    for name, tensor in model.transformer.state_dict().items():
        path = name.replace("h.", "h", 1).split(".") if name.startswith("h.") else name.split(".")
        if path[0] in ("wte", "wpe"):
            out[f"model/{path[0]}"] = tensor.detach().clone()
            continue
        norm = path[-2].startswith("ln_")
        last = {"bias": "b", "weight": "g" if norm else "w"}[path[-1]]
        out["/".join(["model", *path[:-1], last])] = (tensor[None] if last == "w" else tensor).detach().clone()
    return out


def write_openai(directory: Path, model: torch.nn.Module, **more: Tensor) -> Path:
    """A directory as OpenAI published them."""
    directory.mkdir(parents=True, exist_ok=True)
    write_bundle(directory / "model.ckpt", openai_variables(model) | {k.replace("__", "/"): v for k, v in more.items()})
    c = model.config
    hparams = {"n_vocab": c.vocab_size, "n_ctx": c.n_positions, "n_embd": c.n_embd}
    (directory / "hparams.json").write_text(json.dumps({**hparams, "n_head": c.n_head, "n_layer": c.n_layer}))
    return directory

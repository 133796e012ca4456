"""`fastgpt info`: what a model is made of and what it costs, with the source of each formula."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from fastgpt import ops
from fastgpt.checkpoints.weights import load_pretrained
from fastgpt.config import PRESETS, GPTConfig

GPT3_TOKENS = 300e9  # every GPT-3 size: Brown et al. 2020, table 2.1, https://arxiv.org/abs/2005.14165
SECONDS_PER_YEAR = 365.25 * 24 * 3600

# (GPU, FLOP/s sustained, what that assumes)
GPUS = (
    ("V100", 28e12, "28 TFLOP/s sustained, the assumption behind the well-known 355 GPU-years of GPT-3 175B"),
    ("H100", 0.40 * 989e12, "40% of the 989 TFLOP/s dense bf16 peak of the SXM card"),
)


def forward_flops_per_token(config: GPTConfig) -> float:
    """2 FLOPs a matrix weight (head included, embeddings looked up for nothing), and causal attention over T / 2 keys on average.

    Attention: 2 C for a score and 2 C for its share of the values, a key and layer. Kaplan et al. 2020, table 1,
    https://arxiv.org/abs/2001.08361, with the causal half.
    """
    C, L = config.emb_dim, config.n_layers
    matrices = L * (4 * C * C + 2 * C * config.hidden_dim) + config.padded_vocab_size * C
    keys = config.context_length / 2 if config.causal else config.context_length
    return 2.0 * matrices + 4.0 * L * C * keys


def training_flops_per_token(config: GPTConfig) -> float:
    """6 N + 12 L C T, N without position embeddings: PaLM, appendix B, https://arxiv.org/abs/2204.02311, as in nanoGPT's MFU."""
    counts = config.parameter_counts()
    N = config.num_parameters - counts["position embedding"] - (0 if config.tie_weights else counts["token embedding"])
    return 6.0 * N + 12.0 * config.n_layers * config.emb_dim * config.context_length


def kv_cache_bytes(config: GPTConfig, itemsize: int) -> int:
    """Keys and values of one row at full context."""
    return 2 * config.n_layers * config.context_length * config.emb_dim * itemsize


def training_state_bytes(config: GPTConfig) -> int:
    """Parameters, gradients and AdamW's two moments in fp32: 16 bytes a parameter."""
    return 16 * config.num_parameters


def activation_bytes_per_token(config: GPTConfig) -> int:
    """34 C bytes a layer with 16-bit activations and fused attention, dropout included; and 16-bit logits once.

    Korthikanti et al. 2022, equation 2 less its attention-matrix term, https://arxiv.org/abs/2205.05198
    """
    return 34 * config.emb_dim * config.n_layers + 2 * config.padded_vocab_size


def config_of(name: str, allow_pickle: bool = False) -> GPTConfig:
    """Of a preset, else of a model as GPTModel.from_pretrained takes it."""
    return PRESETS[name] if name in PRESETS else load_pretrained(name, allow_pickle=allow_pickle)[0]


def facts(config: GPTConfig) -> dict[str, Any]:
    """What `report` says, as numbers: bytes, and FLOPs a token."""
    return {
        "config": config.to_dict(),
        "parameters": config.num_parameters,
        "parameters_by_part": config.parameter_counts(),
        "weight_bytes_fp32": 4 * config.num_parameters,
        "kv_cache_bytes_fp32": kv_cache_bytes(config, 4),
        "training_state_bytes": training_state_bytes(config),
        "activation_bytes_per_token_bf16": activation_bytes_per_token(config),
        "forward_flops_per_token": forward_flops_per_token(config),
        "training_flops_per_token": training_flops_per_token(config),
    }


def report(name: str, config: GPTConfig) -> str:
    """The text of `fastgpt info NAME`."""
    total = config.num_parameters
    lines = [
        f"{name}: {config.n_layers} layers, width {config.emb_dim:,}, {config.n_heads} heads of {config.head_dim}, "
        f"context {config.context_length:,}, vocabulary {config.vocab_size:,}",
        f"  {config.activation}, {config.norm_position}-norm, head {'tied' if config.tie_weights else 'untied'}",
        "",
        "parameters",
    ]
    for part, count in config.parameter_counts().items():
        lines.append(f"  {part:<20}{count:>18,}{100 * count / total:>7.1f}%")
    lines += [f"  {'total':<20}{total:>18,}", "", "memory                        fp32           bf16"]
    for what, four in (("weights", 4 * total), ("KV cache, one full row", kv_cache_bytes(config, 4))):
        lines.append(f"  {what:<24}{_size(four):>12}{_size(four / 2):>15}")
    tokens = config.context_length
    lines += [
        f"  training state, AdamW   {_size(training_state_bytes(config)):>12}   "
        "(weights, gradients, two moments: 16 B a parameter)",
        f"  activations, one row    {'':>12}{_size(tokens * activation_bytes_per_token(config)):>15}   "
        "(34 C L + 2 V bytes a token; arXiv 2205.05198)",
        "",
        "FLOPs a token",
        f"  forward                 {forward_flops_per_token(config):>12.3e}   "
        "(2 a matrix weight, + 2 L C T: causal attention)",
        f"  training                {training_flops_per_token(config):>12.3e}   "
        "(6 N + 12 L C T: PaLM, arXiv 2204.02311, appendix B)",
    ]
    if name.startswith("gpt3"):
        flops = 6.0 * total * GPT3_TOKENS
        lines += ["", f"training on 300 billion tokens (arXiv 2005.14165, table 2.1): 6 N D = {flops:.2e} FLOPs"]
        lines += [
            f"  {gpu}  {flops / rate / SECONDS_PER_YEAR:>10,.2f} GPU-years at {rate / 1e12:,.0f} TFLOP/s ({why})"
            for gpu, rate, why in GPUS
        ]
    return "\n".join(lines)


def ops_rows(device: torch.device) -> dict[str, dict[str, str]]:
    """By op: which implementation it gets for this device's usual dtype under the backend in force, and why."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = {op: ops.explain(op, device, dtype) for op in (*ops.OPS, "decode_token")}
    return {op: {"implementation": module, "reason": reason} for op, (module, reason) in chosen.items()}


def ops_table(device: torch.device) -> str:
    """`ops_rows` as text; the reason that most ops have is said once."""
    rows = ops_rows(device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    ((common, _),) = Counter(row["reason"] for row in rows.values()).most_common(1)
    lines = [f"backend {ops.current_backend()}, {device}, {dtype}: {common}"]
    for op, row in rows.items():
        own = row["reason"] if row["reason"] != common else ""
        lines.append(f"  {op:<38}{row['implementation']:<14}{own}".rstrip())
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"

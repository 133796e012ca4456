"""nanoGPT code on fastgpt by one changed import, and what that buys on this machine.

    python examples/nanogpt_swap.py [--layers 6] [--width 384] [--context 256] [--batch 8] [--new-tokens 128] [--rounds 5]

    -from model import GPTConfig, GPT
    +from fastgpt.compat.nanogpt import GPTConfig, GPT

"before" is a GPT as nanoGPT users have it: PyTorch alone, its fused attention, no KV cache. It has nanoGPT's names, so that
one state dict fits both. Both must have the same loss, and on a CPU the same tokens for the same seed, before anything is timed.
Times are medians of rounds in turn; fp32 on a CPU, bf16 autocast on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.compat.nanogpt import GPT, GPTConfig


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        packed = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](heads.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class PlainGPT(nn.Module):
    """What a user has before the swap: forward, loss and sampling of nanoGPT in PyTorch's own ops."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([PlainBlock(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = cast(nn.Embedding, self.transformer["wte"]).weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        tree: Any = self.transformer
        x = tree["wte"](idx) + tree["wpe"].weight[: idx.shape[1]]
        for block in tree["h"]:
            x = block(x)
        x = tree["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1].float() / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                logits = logits.masked_fill(logits < least, -torch.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), dim=1)
        return idx


def train_step(model: PlainGPT | GPT, optimizer: torch.optim.Optimizer, idx: Tensor, targets: Tensor) -> float:
    with autocast(idx.device):
        loss = model(idx, targets)[1]
    assert loss is not None
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def sample(model: PlainGPT | GPT, prompt: Tensor, new_tokens: int) -> list[int]:
    torch.manual_seed(1)
    model.eval()
    with autocast(prompt.device):
        out = model.generate(prompt, new_tokens, temperature=0.8, top_k=50)
    model.train()
    return out[0].tolist()


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()  # ends in .item() or .tolist(), so the device is done
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("heads", 6), ("width", 384), ("context", 256), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, default=65, help="65 characters are nanoGPT's shakespeare_char")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    sizes = (args.context, args.vocab, args.layers, args.heads, args.width)
    torch.manual_seed(0)
    after = GPT(GPTConfig(*sizes)).to(device)
    before = PlainGPT(GPTConfig(*sizes)).to(device)
    before.load_state_dict(after.state_dict())
    models: dict[str, PlainGPT | GPT] = {"before": before, "after": after}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
    idx, targets = torch.randint(args.vocab, (2, args.batch, args.context), device=device)
    prompt = idx[:1, : args.context // 4]

    exact = device.type == "cpu"
    tokens = {name: sample(model, prompt, args.new_tokens) for name, model in models.items()}
    losses = {name: train_step(model, optimizers[name], idx, targets) for name, model in models.items()}
    if abs(losses["before"] - losses["after"]) > (1e-4 if exact else 2e-2) * losses["before"]:
        raise SystemExit(f"the losses differ: {losses}")
    if exact and tokens["before"] != tokens["after"]:
        raise SystemExit("the same seed gave other tokens")

    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, model in models.items():
            for what, work in (
                ("training step", lambda m=model, n=name: train_step(m, optimizers[n], idx, targets)),
                ("generation", lambda m=model: sample(m, prompt, args.new_tokens)),
            ):
                times.setdefault((what, name), []).append(seconds(work))

    where = torch.cuda.get_device_name() if not exact else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}, torch {torch.__version__}: {sizes[2]} layers of width {sizes[4]}, context {args.context}")
    same = tokens["before"] == tokens["after"]
    print(f"loss before {losses['before']:.6f}, after {losses['after']:.6f}; same seed, same tokens: {same}\n")
    print(f"{'':16}{'before':>14}{'after':>14}{'ratio':>9}")
    counts = {"training step": args.batch * args.context, "generation": args.new_tokens}
    for what, count in counts.items():
        slow, fast = (statistics.median(times[what, name]) for name in models)
        print(f"{what:16}{count / slow:>10,.0f} t/s{count / fast:>10,.0f} t/s{slow / fast:>8.2f}x")


if __name__ == "__main__":
    main()

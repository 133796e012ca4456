"""transformers code on fastgpt by one added line, and what that buys on this machine.

    python examples/huggingface_swap.py [--model NAME_OR_DIR] [--batch 8] [--context 256] [--new-tokens 128] [--rounds 5]

     model = GPT2LMHeadModel.from_pretrained("gpt2")
    +accelerate(model)

Without --model, the bundled model is given to transformers by `to_hf`, so that no network is needed. Before and after are the
same object: `restore` takes the change back for the next round. Both must have the same loss, and on a CPU the same greedy
tokens, before anything is timed. Times are medians of rounds in turn; fp32 on a CPU, bf16 autocast on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from fastgpt import GPTModel
from fastgpt.compat.huggingface import accelerate, restore, to_hf

VARIANTS: dict[str, Callable[[Any], Any]] = {
    "before": lambda model: model,
    "after": accelerate,
    "no logits": lambda model: accelerate(model, return_logits=False),  # for training code that reads only the loss
}


def train_step(model: Any, optimizer: torch.optim.Optimizer, idx: Tensor) -> float:
    model.train()
    with autocast(idx.device):
        loss = model(idx, labels=idx, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def generate(model: Any, prompt: Tensor, new_tokens: int) -> list[int]:
    model.eval()
    with autocast(prompt.device):
        everything = torch.ones_like(prompt)
        out = model.generate(
            prompt, attention_mask=everything, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0
        )
    return out[0].tolist()


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()  # ends in .item() or .tolist(), so the device is done
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="for transformers' from_pretrained; the bundled model when left out")
    for name, default in (("batch", 8), ("context", 256), ("new-tokens", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    if args.model is None:
        model = to_hf(GPTModel.from_pretrained("bundled"), copy=True)
    else:
        model = GPT2LMHeadModel.from_pretrained(args.model)
    nn.Module.to(model, device)  # transformers wraps its own, which type checkers can't read
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # else the losses would differ by the masks that the kernels draw
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    torch.manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (args.batch, args.context), device=device)
    prompt = idx[:1, : args.context // 4]

    exact, original = device.type == "cpu", {name: value.clone() for name, value in model.state_dict().items()}
    tokens, losses = {}, {}
    for name, change in VARIANTS.items():
        change(model)
        tokens[name] = generate(model, prompt, args.new_tokens)
        losses[name] = train_step(model, optimizer, idx)
        model.load_state_dict(original)
        if name != "before":
            restore(model)
    if max(losses.values()) - min(losses.values()) > (1e-4 if exact else 2e-2) * losses["before"]:
        raise SystemExit(f"the losses differ: {losses}")
    if exact and tokens["before"] != tokens["after"]:
        raise SystemExit("the greedy tokens differ")

    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, change in VARIANTS.items():
            change(model)
            step = seconds(lambda: train_step(model, optimizer, idx))
            times.setdefault(("training step", name), []).append(step)
            times.setdefault(("generation", name), []).append(seconds(lambda: generate(model, prompt, args.new_tokens)))
            if name != "before":
                restore(model)

    where = torch.cuda.get_device_name() if not exact else f"CPU, {torch.get_num_threads()} threads"
    config = model.config
    print(
        f"\n{where}, torch {torch.__version__}: {config.n_layer} layers of width {config.n_embd}, context {args.context}"
    )
    same = tokens["before"] == tokens["after"]
    print(f"loss before {losses['before']:.6f}, after {losses['after']:.6f}; same greedy tokens: {same}\n")
    print(f"{'tokens/s':16}" + "".join(f"{name:>14}" for name in VARIANTS) + f"{'ratio':>9}{'no logits':>11}")
    for what, count in (("training step", args.batch * args.context), ("generation", args.new_tokens)):
        medians = [statistics.median(times[what, name]) for name in VARIANTS]
        ratios = f"{medians[0] / medians[1]:>8.2f}x{medians[0] / medians[2]:>10.2f}x"
        print(f"{what:16}" + "".join(f"{count / median:>14,.0f}" for median in medians) + ratios)


if __name__ == "__main__":
    main()

"""Code of "Build a Large Language Model (From Scratch)" before and after its import is changed: same tokens, other times.

python examples/llms_from_scratch_swap.py            # a small model
python examples/llms_from_scratch_swap.py --full     # the book's GPT_CONFIG_124M

"Before" needs the book's package: pip install --no-deps llms-from-scratch; pip install tiktoken matplotlib tqdm
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch

GPT_CONFIG_124M = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}
SMALL = {**GPT_CONFIG_124M, "vocab_size": 8000, "context_length": 256, "emb_dim": 256, "n_heads": 4, "n_layers": 4}


def before() -> SimpleNamespace:
    from llms_from_scratch.ch04 import GPTModel
    from llms_from_scratch.ch05 import calc_loss_batch, generate

    return SimpleNamespace(GPTModel=GPTModel, calc_loss_batch=calc_loss_batch, generate=generate)


def after() -> SimpleNamespace:
    from fastgpt.compat.llms_from_scratch import GPTModel, calc_loss_batch, generate

    return SimpleNamespace(GPTModel=GPTModel, calc_loss_batch=calc_loss_batch, generate=generate)


def run(book: SimpleNamespace, cfg: dict, device: torch.device, new_tokens: int, steps: int) -> SimpleNamespace:
    """The same code for both: a prompt of 32 tokens continued, then training steps on 2 rows of up to 256 tokens."""
    torch.manual_seed(123)
    model = book.GPTModel(cfg).to(device).eval()
    prompt = torch.randint(cfg["vocab_size"], (1, 32), device=device)
    book.generate(model, prompt, 2, cfg["context_length"])  # warm up
    tokens, generating = timed(device, lambda: book.generate(model, prompt, new_tokens, cfg["context_length"]))

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    rows = torch.randint(cfg["vocab_size"], (2, 1 + min(256, cfg["context_length"])), device=device)

    def step() -> float:
        optimizer.zero_grad()
        loss = book.calc_loss_batch(rows[:, :-1], rows[:, 1:], model, device)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()  # warm up
    results = [timed(device, step) for _ in range(steps)]
    training = sorted(seconds for _, seconds in results)[steps // 2]
    return SimpleNamespace(
        tokens=tokens.tolist(),
        loss=results[-1][0],
        tokens_per_second=new_tokens / generating,
        trained_per_second=rows[:, 1:].numel() / training,
    )


def timed(device: torch.device, work):
    """(what work returns, seconds), the device's queue included."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="The book's code on its own model and on this one.")
    parser.add_argument("--full", action="store_true", help="GPT_CONFIG_124M instead of a small model")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3, help="training steps, of which the median is shown")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = GPT_CONFIG_124M if arguments.full else SMALL

    results = {}
    for name, imports in (("llms_from_scratch", before), ("fastgpt.compat.llms_from_scratch", after)):
        try:
            book = imports()
        except ImportError as error:
            print(f"{name} is left out: {error}. See the head of this file for what to install.")
            continue
        results[name] = run(book, cfg, device, arguments.new_tokens, arguments.steps)

    print(f"{cfg['n_layers']} layers of width {cfg['emb_dim']} on {device}, torch {torch.__version__}")
    print(f"{'import from':34}{'generated tok/s':>17}{'trained tok/s':>15}{'last loss':>11}")
    for name, result in results.items():
        print(f"{name:34}{result.tokens_per_second:17.1f}{result.trained_per_second:15.0f}{result.loss:11.4f}")
    if len(results) == 2:
        old, new = results.values()
        generated = new.tokens_per_second / old.tokens_per_second
        trained = new.trained_per_second / old.trained_per_second
        print(f"{'times as fast':34}{generated:17.2f}{trained:15.2f}")
        print(f"same tokens: {'yes' if old.tokens == new.tokens else 'NO'}")


if __name__ == "__main__":
    main()

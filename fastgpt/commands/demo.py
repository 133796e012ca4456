"""`fastgpt demo`: the bundled model writes some Python, then shows what the KV cache is worth and which code ran."""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import TYPE_CHECKING

from fastgpt.commands import DONE, FAILED
from fastgpt.commands.options import device_option, pick_device

if TYPE_CHECKING:
    from fastgpt.model import GPTModel

# No line end behind it: GPT-2's pattern makes one token of a line end and the spaces after it, so that the model, which has seen
# no other, would go on unindented.
PROMPT = '''class Stack:
    """A last-in, first-out stack."""

    def __init__(self):
        self._items = []

    def push(self, item):'''
LENGTHS = (64, 256, 1024)
NEW_TOKENS = 24


HELP = "Stream a continuation from the bundled model, then compare generation with and without the KV cache."
EXAMPLE = "fastgpt demo --seed 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=160, help="length of the continuation")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    device_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the demo; it failed if generation with and without the cache ever disagree."""
    import torch

    from fastgpt import GPTModel, generate, load_tokenizer
    from fastgpt.info import ops_table

    device = pick_device(arguments.device)
    model = GPTModel.from_pretrained("bundled", device)
    tokenizer = load_tokenizer("bundled")
    config = model.config
    print(
        f"The bundled model: {config.num_parameters / 1e6:.1f}M parameters, {config.n_layers} layers, width {config.emb_dim}, "
        f"context {config.context_length}, trained on the standard library and other Python sources. It runs on {device}"
        + (f" with {torch.get_num_threads()} threads." if device.type == "cpu" else ".")
    )
    print("\n--- It continues a Python class ---\n")
    sys.stdout.write(PROMPT)
    decoder = tokenizer.stream()
    steps = generate(
        model,
        [tokenizer.encode(PROMPT)],
        arguments.max_new_tokens,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.05,
        stop_tokens=() if tokenizer.end_of_text is None else (tokenizer.end_of_text,),
        generator=torch.Generator(device=device).manual_seed(arguments.seed),
        stream=True,
    )
    for step in steps:
        if step.tokens[0] is not None and step.tokens[0] != tokenizer.end_of_text:
            sys.stdout.write(decoder.add(step.tokens[0]))
            sys.stdout.flush()
    print(decoder.finish())

    print(f"\n--- Tokens per second, batch 1, over the last {NEW_TOKENS - 1} tokens of a text of each length ---\n")
    print(f"{'length':>8}{'with KV cache':>16}{'without':>12}{'ratio':>8}   same tokens")
    agree = True
    # Shuffled text, so that greedy decoding meets no easy repetition.
    words = tokenizer.encode(PROMPT * 40)
    random.Random(0).shuffle(words)
    for length in LENGTHS:
        prompt = (words * (length // len(words) + 1))[: length - NEW_TOKENS]
        cached_tokens, cached = _rate(model, prompt, use_cache=True)
        plain_tokens, plain = _rate(model, prompt, use_cache=False)
        same = cached_tokens == plain_tokens
        agree = agree and same
        print(f"{length:>8}{cached:>16,.0f}{plain:>12,.0f}{cached / plain:>7.1f}x   {'yes' if same else 'NO'}")

    print("\n--- Which code ran, and why ---\n")
    print(ops_table(device))
    return DONE if agree else FAILED


def _rate(model: GPTModel, prompt: list[int], use_cache: bool) -> tuple[list[int], float]:
    """Greedy tokens, and tokens per second after the first one (which pays for reading the prompt)."""
    from fastgpt import generate

    tokens: list[int] = []
    started = 0.0
    for step in generate(model, [prompt], NEW_TOKENS, use_cache=use_cache, stream=True):
        if not tokens:
            started = time.perf_counter()
        tokens += [token for token in step.tokens if token is not None]
    return tokens, (len(tokens) - 1) / (time.perf_counter() - started)

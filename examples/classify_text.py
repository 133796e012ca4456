"""Make a classifier of a language model, as in chapter 6 of "Build a Large Language Model (From Scratch)".

    python examples/classify_text.py [--max-steps N]

The task: is a line Python code, or prose? Lines come from Python's own standard library and its documentation. The head is
replaced by one with two outputs; the last block, the final norm and the head are trained, the rest stays as it was
(https://github.com/rasbt/LLMs-from-scratch, ch06). Only the last token has seen the whole line, so its logits decide.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import GPTModel
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import Tokenizer, load_tokenizer

LONGEST = 64  # tokens of a line that are read


def lines() -> list[tuple[str, int]]:
    """(line, 1 for code or 0 for prose), as many of each, shuffled."""
    code = [line.strip() for line in inspect.getsource(argparse).splitlines()]
    prose = [line.strip() for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    draw = random.Random(0)
    sets = [sorted({line for line in kind if len(line) > 20}) for kind in (prose, code)]
    count = min(map(len, sets))
    examples = [(line, label) for label, kind in enumerate(sets) for line in draw.sample(kind, count)]
    draw.shuffle(examples)
    return examples


def batch(tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T] padded on the right, the last token's position [B], labels [B])"""
    rows = [tokenizer.encode(line)[:LONGEST] for line, _ in examples]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(idx, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return idx, torch.tensor([len(ids) - 1 for ids in rows]), torch.tensor([label for _, label in examples])


@torch.no_grad()
def accuracy(model: GPTModel, tokenizer: Tokenizer, examples: list[tuple[str, int]]) -> float:
    model.eval()
    right = 0
    for start in range(0, len(examples), 64):
        idx, last, labels = batch(tokenizer, examples[start : start + 64])
        right += int((model(idx, logits_at=last)[:, 0].argmax(-1) == labels).sum())
    return right / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-steps", type=int, default=100)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = GPTModel.from_pretrained("bundled"), load_tokenizer(BUNDLED)
    examples = lines()
    held_out, training = examples[:200], examples[200:]

    model.requires_grad_(False)
    model.out_head = nn.Linear(model.config.emb_dim, 2)
    for part in (model.trf_blocks[-1], model.final_norm, model.out_head):
        part.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    print(f"held-out accuracy before: {accuracy(model, tokenizer, held_out):.3f}")
    for step in range(arguments.max_steps):
        model.train()
        start = 16 * step % (len(training) - 16)
        idx, last, labels = batch(tokenizer, training[start : start + 16])
        loss = F.cross_entropy(model(idx, logits_at=last)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"held-out accuracy after {arguments.max_steps} steps: {accuracy(model, tokenizer, held_out):.3f}")


if __name__ == "__main__":
    main()

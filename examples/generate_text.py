"""Load a model, continue a prompt, and stream the text as it comes.

python examples/generate_text.py "import os" [MODEL]
"""

from __future__ import annotations

import sys

import torch

from fastgpt import GPTModel, generate
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import load_tokenizer


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "def main():\n"
    source = sys.argv[2] if len(sys.argv) > 2 else "bundled"
    model = GPTModel.from_pretrained(source)
    tokenizer = load_tokenizer(BUNDLED if source == "bundled" else source)

    print(prompt, end="")
    decoder = tokenizer.stream()
    draws = torch.Generator().manual_seed(0)
    for step in generate(
        model, [tokenizer.encode(prompt)], 100, temperature=0.7, top_p=0.9, generator=draws, stream=True
    ):
        for token in step.tokens:  # one prompt, one token; None once its row has ended
            print("" if token is None else decoder.add(token), end="", flush=True)
    print(decoder.finish())


if __name__ == "__main__":
    main()

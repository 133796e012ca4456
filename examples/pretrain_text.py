"""Pretrain a small model on one text file, then let it write.

    python examples/pretrain_text.py text.txt out/run [--max-steps N]

The same from the command line, with validation, samples and checkpoints at intervals and a progress bar:
`fastgpt train text.txt --out out/run --tokenizer char`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt import GPTConfig
from fastgpt.text.data import TokenStream, encode_documents, split_validation
from fastgpt.text.documents import read_text
from fastgpt.text.tokenizer import SymbolTokenizer
from fastgpt.training import Trainer, TrainSettings, new_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()

    text = read_text(arguments.text)
    tokenizer = SymbolTokenizer.from_text("char", text)
    context = arguments.context
    training, held_out = split_validation(encode_documents(tokenizer, [text]), 0.05, 2 * context + 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = GPTConfig(tokenizer.n_vocab, context, 192, 6, 6, drop_rate=0.1, tie_weights=True, init="gpt2")
    model = new_model(config, seed=0, device=device)

    dtype = "bfloat16" if device.type == "cuda" else "float32"  # many CPUs have no products of bfloat16
    settings = TrainSettings(max_steps=arguments.max_steps, batch_size=16, lr=1e-3, warmup_steps=50, dtype=dtype)
    data = TokenStream(training, context, settings.batch_size, settings.seed)
    trainer = Trainer(model, tokenizer, data, TokenStream(held_out, context, 8), settings, arguments.out)
    trainer.run(lambda entry: print(entry) if "validation_loss" in entry or entry["step"] % 50 == 0 else None)

    start = torch.tensor([tokenizer.encode(text[:1])], device=device)
    written = model.generate(start, 100, temperature=0.8, top_k=20)
    print(tokenizer.decode(written[0].tolist()))


if __name__ == "__main__":
    main()

"""Fine-tune a checkpoint on a text file, whole or by adapters of low rank, and measure what it brought.

    python examples/finetune.py text.txt out/run [--model gpt2] [--lora-rank 8]

The last twentieth of the text is held out; its bits per byte are printed before and after. The result is one ordinary model
directory either way: adapters (PEFT) are merged where the model is saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgpt import GPTModel
from fastgpt.evaluation import evaluate
from fastgpt.files import BUNDLED
from fastgpt.text.data import TokenStream, encode_documents, split_validation
from fastgpt.text.documents import read_text
from fastgpt.text.tokenizer import load_tokenizer
from fastgpt.training import Trainer, TrainSettings, add_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=str(BUNDLED), help="a model directory, or a name on the hub such as gpt2")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank; 0: all weights")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPTModel.from_pretrained(arguments.model, device)
    tokenizer = load_tokenizer(arguments.model if Path(arguments.model).is_dir() else "gpt2")
    tokens = encode_documents(tokenizer, [read_text(arguments.text)])
    training, held_out = split_validation(tokens, 0.05, 2 * arguments.context + 1)
    unseen = [tokenizer.decode(held_out.tolist())]
    before = evaluate(model, tokenizer, unseen).bits_per_byte

    if arguments.lora_rank:
        add_lora(model, arguments.lora_rank, alpha=16.0)
    # A tenth of the rate of pretraining for whole weights; adapters start at zero and take more.
    lr = 1e-3 if arguments.lora_rank else 1e-4
    settings = TrainSettings(max_steps=arguments.max_steps, batch_size=8, lr=lr, warmup_steps=10, weight_decay=0.0)
    data = TokenStream(training, arguments.context, settings.batch_size)
    Trainer(model, tokenizer, data, TokenStream(held_out, arguments.context, 4), settings, arguments.out).run()

    after = evaluate(GPTModel.from_pretrained(arguments.out, device), tokenizer, unseen).bits_per_byte
    print(f"held-out text: {before:.4f} bits per byte before, {after:.4f} after {arguments.max_steps} steps")


if __name__ == "__main__":
    main()

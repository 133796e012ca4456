"""Stop a run in the middle, go on from its checkpoint, and compare with a run that was never stopped: bit for bit the same.

    python examples/resume.py out

On the command line it is `fastgpt train FILE --out RUN --resume`: the run's own settings stand where no flag says otherwise.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from fastgpt import GPTConfig
from fastgpt.text.data import TokenStream, encode_documents, split_validation
from fastgpt.text.tokenizer import SymbolTokenizer
from fastgpt.training import Trainer, TrainSettings, new_model

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 100


def trainer(directory: Path) -> Trainer:
    tokenizer = SymbolTokenizer.from_text("char", TEXT)
    training, held_out = split_validation(encode_documents(tokenizer, [TEXT]), 0.1, 65)
    model = new_model(GPTConfig(tokenizer.n_vocab, 32, 64, 4, 2, drop_rate=0.1), seed=0, device=torch.device("cpu"))
    settings = TrainSettings(max_steps=60, batch_size=4, checkpoint_every=20, warmup_steps=10)
    data = TokenStream(training, 32, settings.batch_size)
    return Trainer(model, tokenizer, data, TokenStream(held_out, 32, 4), settings, directory)


def stop_at_35(entry: dict[str, Any]) -> None:
    """As a cluster would: SIGTERM ends the run after the step in hand, with a whole checkpoint."""
    if entry["step"] == 35:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out

    straight = trainer(out / "straight")
    straight.run()
    first = trainer(out / "stopped")
    first.run(stop_at_35)
    second = trainer(out / "stopped")
    second.resume()
    print(f"stopped after step {first.step}, resumed at step {second.step}")
    second.run()

    weights = zip(straight.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in weights)
    print(f"weights bit for bit the same: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()

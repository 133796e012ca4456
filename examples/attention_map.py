"""Draw who attends to whom in a sentence: one layer and head of a model, as a heat map.

python examples/attention_map.py "def add(a, b):" --layer 1 --head 2 --out attention.png [--model DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastgpt import GPTModel
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentence")
    parser.add_argument("--model", default="bundled", help="a model directory, or bundled")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    arguments = parser.parse_args()

    model = GPTModel.from_pretrained(arguments.model)
    tokenizer = load_tokenizer(BUNDLED if arguments.model == "bundled" else arguments.model)
    layers, heads = model.config.n_layers, model.config.n_heads
    if not (0 <= arguments.layer < layers and 0 <= arguments.head < heads):
        parser.error(
            f"layer must be 0 to {layers - 1} and head 0 to {heads - 1}, got {arguments.layer} and {arguments.head}"
        )
    ids = tokenizer.encode(arguments.sentence)
    if not 0 < len(ids) <= model.config.context_length:
        parser.error(f"the sentence must be 1 to {model.config.context_length} tokens, got {len(ids)}")

    weights = model.attention_weights(torch.tensor([ids]))[arguments.layer, 0, arguments.head]  # [T, T]

    labels = [repr(tokenizer.decode([token]))[1:-1] for token in ids]
    side = max(4.0, 0.32 * len(ids) + 2.0)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="attended to", ylabel="from", title=f"layer {arguments.layer}, head {arguments.head}"
    )
    image = axes.imshow(weights.numpy(), cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(ids)), labels, rotation=90, family="monospace")
    axes.set_yticks(range(len(ids)), labels, family="monospace")
    figure.colorbar(image, ax=axes, shrink=0.7, label="probability")
    figure.savefig(arguments.out, dpi=120)
    print(f"{len(ids)} tokens, {arguments.out}")


if __name__ == "__main__":
    main()

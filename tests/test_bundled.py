"""The model in fastgpt/assets: size, card, what it predicts, and the demo that shows it."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from examples.train_bundled_model import grown, parses, standard_library, xz_bits_per_byte
from fastgpt import GPTModel
from fastgpt.cli import main
from fastgpt.evaluation import evaluate
from fastgpt.files import BUNDLED
from fastgpt.text.tokenizer import load_tokenizer


def test_size_and_card():
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir() if path.is_file()}
    assert sum(files.values()) <= 8_000_000
    card = (BUNDLED / "MODEL_CARD.md").read_text(encoding="utf-8")
    model = GPTModel.from_pretrained("bundled")
    assert f"{model.config.num_parameters:,}" in card
    for word in ("Data", "Licence", "Size", "Training command", "held-out bits per byte"):
        assert word.lower() in card.lower(), word


def test_held_out_files_cost_fewer_bits_than_xz():
    """On the standard library of the Python that runs the tests; the card's figure is for the one it was trained on."""
    held_out = list(standard_library()[1].values())
    before = itertools.accumulate(map(len, held_out), initial=0)
    documents = [text for text, start in zip(held_out, before, strict=False) if start < 80_000]
    assert sum(map(len, documents)) > 50_000
    # In windows side by side, which see less than those of the card.
    result = evaluate(GPTModel.from_pretrained("bundled"), load_tokenizer(BUNDLED), documents, stride=1024)
    xz = xz_bits_per_byte(documents)
    print(f"{result.bits_per_byte:.4f} bits per byte, xz -9 {xz:.4f}")
    assert result.bits_per_byte < 0.9 * xz


def test_tokenizer_round_trips_and_fits_the_model():
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer.n_vocab == GPTModel.from_pretrained("bundled").config.vocab_size
    for text in ("def f(x):\n    return x\n", "naïve 漢字 🎉\t\x00", "<|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("context", [64, 256, 1000])
def test_cached_tokens_equal_uncached(context):
    model = GPTModel.from_pretrained("bundled")
    idx = torch.randint(model.config.vocab_size, (1, context))
    assert torch.equal(model.generate(idx, 12), model.generate(idx, 12, use_cache=False))


def test_demo_agrees_and_explains(capsys):
    assert main(["demo", "--max-new-tokens", "20", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(64|256|1024) +([\d,]+) +([\d,]+) +([\d.]+)x +(yes|NO)$", printed, flags=re.M)
    assert [row[0] for row in rows] == ["64", "256", "1024"]
    assert all(row[4] == "yes" for row in rows)
    assert "attention" in printed
    assert "tensors are on cpu" in printed


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("def f():\n    return 1\n", False),  # the last line may be cut, and nothing else is there
        ("def f():\n    return 1\n    retu", True),
        ("def f():\n    x = (1,\n    2, 3\n", False),  # no whole statement
        ("def f():\n    x = 1\n    y = (1,\n    2, 3\n", True),
        ("def f():\n    x = 1\n    try:\n        y = 2\n    z\n    w", False),
        ("def f():\n    x = 1\n    try:\n        y = 2\n", True),
        ("def f():\n    x = 1\n    if x:\n    y = 2\n    z", False),
        ("def f():\n    x = 1\n    y = )\n    z", False),
        ('def f():\n    """A docstring that has\n    no end\n', False),
        ('def f():\n    """One."""\n    x = """\n  it goes on\n', True),
        ("def f():\n    x = 1\n  y = 2\n    z", False),
    ],
)
def test_what_counts_as_parsing(text, accepted):
    assert parses(text) is accepted


def test_growing_keeps_the_function():
    model = GPTModel.from_pretrained("bundled")
    idx = torch.randint(model.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    deeper = grown(model).eval()
    assert deeper.config.n_layers == 2 * model.config.n_layers
    assert torch.equal(deeper(idx), model(idx))
    deeper.loss(idx[:, :-1], idx[:, 1:]).backward()
    assert all(bool(block.ff.layers[2].weight.grad.any()) for block in deeper.trf_blocks)  # each begins to learn

"""The book's data loaders, training loop and plots."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from book_models import Letters, ch02, ch05, loaders, twins

from fastgpt.compat import llms_from_scratch as book


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_train_model_simple_is_upstreams(optimizer, drop_rate, capsys):
    results = []
    train, val = loaders()
    for module, gpt in zip((ch05, book), twins(drop_rate=drop_rate), strict=True):
        torch.manual_seed(1)
        losses = module.train_model_simple(
            gpt, train, val, optimizer(gpt.parameters(), lr=1e-3), "cpu", 2, 2, 3, "Every effort moves you", Letters()
        )
        results.append((losses, capsys.readouterr().out))
    (expected, expected_text), (got, text) = results
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-4)
    assert got[2] == expected[2]
    assert len(got[0]) == 5
    assert got[0][-1] < got[0][0]
    assert text.split("\n")[0] == expected_text.split("\n")[0]
    assert text.count("\n") == expected_text.count("\n") == 7


def test_losses_of_a_loader():
    upstream, model = twins()
    train, _ = loaders()
    for count in (None, 2, 99):
        expected = ch05.calc_loss_loader(train, upstream, "cpu", num_batches=count)
        assert book.calc_loss_loader(train, model, "cpu", num_batches=count) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(book.calc_loss_loader([], model, "cpu"))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_samples_restore_the_mode(training, capsys):
    upstream, model = twins(drop_rate=0.5)
    train, val = loaders()
    expected = ch05.evaluate_model(upstream, train, val, "cpu", 2)
    model.train(training)
    assert book.evaluate_model(model, train, val, "cpu", 2) == pytest.approx(expected, rel=1e-5)
    assert model.training is training
    ch05.generate_and_print_sample(upstream, Letters(), "cpu", "Hello\n you")
    expected = capsys.readouterr().out
    book.generate_and_print_sample(model, Letters(), "cpu", "Hello\n you")
    assert capsys.readouterr().out == expected
    assert model.training is training


def byte_encoding():
    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"he": 257}
    return tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


@pytest.mark.parametrize(("max_length", "stride"), [(4, 1), (4, 4), (7, 3), (3, 9), (400, 5)])
@pytest.mark.parametrize("text", ["the other one<|endoftext|> and the last " * 5, "abcd", "abcde", ""])
def test_datasets_windows_are_upstreams(max_length, stride, text):
    expected = ch02.GPTDatasetV1(text, byte_encoding(), max_length, stride)
    got = book.GPTDatasetV1(text, byte_encoding(), max_length, stride)
    assert len(got) == len(expected)
    for (x, y), (their_x, their_y) in zip(map(got.__getitem__, range(len(got))), expected, strict=False):
        assert torch.equal(x, their_x)
        assert torch.equal(y, their_y)


@pytest.mark.parametrize("name", ["max_length", "stride"])
def test_bad_window_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        book.GPTDatasetV1("abc", Letters(), **{"max_length": 2, "stride": 2, name: 0})


def test_dataloader_is_upstreams(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: {"gpt2": byte_encoding()}[name])
    text = "In the beginning there was<|endoftext|>the word. " * 8
    for options in ({}, {"shuffle": False, "drop_last": False, "batch_size": 3}):
        torch.manual_seed(6)
        expected = list(ch02.create_dataloader_v1(text, max_length=8, stride=5, **options))
        torch.manual_seed(6)
        got = list(book.create_dataloader_v1(text, max_length=8, stride=5, **options))
        assert len(got) == len(expected) > 3
        for batch, theirs in zip(got, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, theirs, strict=True))


def test_plot_losses_draws_upstreams_lines(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    arguments = ([0.0, 0.5, 1.0], [10, 20, 30], [3.0, 2.0, 1.0], [3.5, 3.0, 2.9])
    ch05.plot_losses(*arguments)
    (tmp_path / "loss-plot.pdf").unlink()
    book.plot_losses(*arguments)
    assert (tmp_path / "loss-plot.pdf").read_bytes().startswith(b"%PDF")
    drawn = [
        [
            (axes.get_xlabel(), axes.get_ylabel(), [line.get_xydata().tolist() for line in axes.lines])
            for axes in figure.axes
        ]
        for figure in figures
    ]
    assert drawn[0] == drawn[1]
    plt.close("all")

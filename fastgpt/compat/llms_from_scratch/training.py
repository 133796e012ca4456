"""The book's way of training: ch02's data loader and ch05's losses, loop and plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastgpt.compat.llms_from_scratch.generation import (
    generate_text_simple,
    ours,
    text_to_token_ids,
    token_ids_to_text,
    unwrapped,
)
from fastgpt.inference.batch import evaluating
from fastgpt.plan import plain
from fastgpt.text.tokenizer import load_tokenizer

Device: TypeAlias = "torch.device | str"


class Loader(Sized, Protocol):
    """What is asked of a data loader: batches of (inputs, targets), and their number."""

    def __iter__(self) -> Iterator[Any]: ...


class GPTDatasetV1(Dataset[tuple[Tensor, Tensor]]):
    """ch02: windows of max_length tokens, one every `stride`, each with itself moved by one as the target.

    `input_ids` and `target_ids` are int64 [N, max_length] views of the text's tokens; N is 0 for a text of fewer than
    max_length + 1 tokens.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        for name, value in (("max_length", max_length), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        tokens = torch.tensor(tokenizer.encode(txt, allowed_special={"<|endoftext|>"}), dtype=torch.int64)
        windows = (
            tokens.unfold(0, max_length + 1, stride)
            if len(tokens) > max_length
            else tokens.new_empty(0, max_length + 1)
        )
        self.input_ids, self.target_ids = windows[:, :-1], windows[:, 1:]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor]:
        return self.input_ids[idx], self.target_ids[idx]


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """ch02: a DataLoader of a GPTDatasetV1 of GPT-2's tokens. ValueError where GPT-2's vocabulary can't be had."""
    dataset = GPTDatasetV1(txt, load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers)


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Device) -> Tensor:
    """Mean cross-entropy in nats of a batch [B, T]; targets of -100 don't count.

    A GPTModel of fastgpt computes head and loss in one op that keeps no [B * T, V] logits; a wrapper, a model with hooks on it
    or any other is called for its logits.
    """
    input_batch, target_batch = input_batch.to(device, non_blocking=True), target_batch.to(device, non_blocking=True)
    if ours(model) and plain(model, type(model)):
        return model.loss(input_batch, target_batch)
    return F.cross_entropy(model(input_batch).flatten(0, 1), target_batch.flatten())


def calc_loss_loader(data_loader: Loader, model: nn.Module, device: Device, num_batches: int | None = None) -> float:
    """Mean of the batches' losses, of the first num_batches at most; NaN for a loader without batches."""
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    if count == 0:
        return float("nan")
    batches = zip(range(count), data_loader, strict=False)
    losses = [calc_loss_batch(inputs, targets, model, device).detach() for _, (inputs, targets) in batches]
    return sum(torch.stack(losses).tolist()) / count


def evaluate_model(
    model: nn.Module, train_loader: Loader, val_loader: Loader, device: Device, eval_iter: int | None
) -> tuple[float, float]:
    """(training loss, validation loss) in eval mode, of eval_iter batches each. The model's mode is restored."""
    with evaluating(model), torch.no_grad():
        return (
            calc_loss_loader(train_loader, model, device, num_batches=eval_iter),
            calc_loss_loader(val_loader, model, device, num_batches=eval_iter),
        )


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: Device, start_context: str) -> None:
    """Print 50 tokens after start_context on one line. The model's mode is restored."""
    with evaluating(model):
        token_ids = generate_text_simple(
            model,
            text_to_token_ids(start_context, tokenizer).to(device),
            max_new_tokens=50,
            context_size=unwrapped(model).pos_emb.weight.shape[0],
        )
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


def train_model_simple(
    model: nn.Module,
    train_loader: Loader,
    val_loader: Loader,
    optimizer: torch.optim.Optimizer,
    device: Device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """Train; every eval_freq steps evaluate and print, after every epoch print a sample.

    Returns (training losses, validation losses, tokens seen) of the evaluations.
    """
    train_losses: list[float] = []
    val_losses: list[float] = []
    track_tokens_seen: list[int] = []
    tokens_seen, step = 0, 0
    for epoch in range(1, num_epochs + 1):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(input_batch, target_batch, model, device).backward()
            optimizer.step()
            tokens_seen += input_batch.numel()
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def plot_losses(
    epochs_seen: Sequence[float], tokens_seen: Sequence[int], train_losses: Sequence[float], val_losses: Sequence[float]
) -> None:
    """Show both curves over epochs, with tokens seen on a second axis above, and save them as loss-plot.pdf. Needs matplotlib."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(5, 3))
    axes.plot(epochs_seen, train_losses, label="Training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="Validation loss")
    axes.set_xlabel("Epochs")
    axes.set_ylabel("Loss")
    axes.legend(loc="upper right")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    above = axes.twiny()
    above.plot(tokens_seen, train_losses, alpha=0)  # unseen: it sets the range of the axis
    above.set_xlabel("Tokens seen")
    figure.tight_layout()
    plt.savefig("loss-plot.pdf")
    plt.show()

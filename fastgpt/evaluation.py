"""How well a model predicts text: bits per byte and perplexity over a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastgpt.inference.batch import evaluating
from fastgpt.model import GPTModel
from fastgpt.text.data import encode_documents
from fastgpt.text.tokenizer import Tokenizer
from fastgpt.transfer import uploaded

WINDOWS_PER_BATCH = 8  # logits of 8 windows of 1024 and GPT-2's vocabulary are 1.6 GB in fp32


class Evaluation(NamedTuple):
    """bits_per_byte: what the text costs under the model, separators between documents included, over its UTF-8 bytes.
    perplexity: exp of the mean loss a token. bytes: of the text. tokens: predicted; all, but for the first of a tokenizer that
    has no "<|endoftext|>" to predict it from. bytes_per_token: of the tokenizer on this text, separators not counted."""

    bits_per_byte: float
    perplexity: float
    bytes: int
    tokens: int
    bytes_per_token: float


@torch.no_grad()
def evaluate(
    model: GPTModel,
    tokenizer: Tokenizer,
    documents: list[str],
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score documents, read one after another with "<|endoftext|>" between them where the tokenizer has it.

    Args:
        model: scored in eval mode, on its device; its mode is restored.
        tokenizer: the model's own.
        documents: texts; together at least two tokens.
        stride: new tokens a window; each is predicted from at least context_length - stride before it, but for the first
            window. Half the context by default; smaller is slower and a little better.
        progress: told how many of all tokens are scored.
    """
    if not model.config.causal:
        raise ValueError("a model with causal=False sees the tokens that it should predict; it has no bits per byte")
    size = sum(len(document.encode("utf-8", errors="replace")) for document in documents)
    if size == 0:
        raise ValueError(f"there is no text to evaluate: {len(documents)} documents of 0 bytes")
    # With an end of text, the first token is predicted too, from the end of nothing.
    tokens = encode_documents(tokenizer, documents if tokenizer.end_of_text is None else ["", *documents])
    if len(tokens) < 2:
        raise ValueError(f"there must be at least two tokens to evaluate, got {len(tokens)}")
    if int(tokens.max()) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {int(tokens.max())}, the model a vocabulary of {model.config.vocab_size}"
        )
    context = model.config.context_length
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context length {context}, got {stride}")
    ids = torch.from_numpy(tokens.astype("int64"))
    sums: list[torch.Tensor] = []
    with evaluating(model):
        for batch in _batches(list(_windows(len(ids), context, stride))):
            length = max(end - start for start, _, end in batch)
            rows = torch.zeros(len(batch), length + 1, dtype=torch.int64)
            counted = torch.zeros(len(batch), length, dtype=torch.bool)
            for row, (start, new, end) in enumerate(batch):
                rows[row, : end - start + 1] = ids[start : end + 1]
                counted[row, new - start : end - start] = True
            # Which positions count is known here, so that nothing has to wait for the device to say how many.
            at = uploaded(counted.flatten().nonzero()[:, 0], model.device)
            targets = uploaded(rows[:, 1:][counted], model.device)
            logits = model(uploaded(rows[:, :-1].contiguous(), model.device)).flatten(0, 1)[at].float()
            sums.append(F.cross_entropy(logits, targets, reduction="none").double().sum())
            progress(batch[-1][2], len(ids) - 1)
    nats = sum(torch.stack(sums).tolist())
    predicted = len(ids) - 1
    mean = nats / predicted
    perplexity = math.inf if mean > 700 else math.exp(mean)  # exp overflows a float at 709.8
    separators = 0 if tokenizer.end_of_text is None else len(documents) + 1
    per_token = size / (len(tokens) - separators)
    return Evaluation(nats / math.log(2) / size, perplexity, size, predicted, per_token)


def _windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, new, end): a window reads tokens start .. end - 1 and is scored on predicting those after new .. end - 1."""
    end = 0
    while end < count - 1:
        new = end
        end = min(context if end == 0 else end + stride, count - 1)
        yield max(end - context, 0), new, end


def _batches(windows: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    for start in range(0, len(windows), WINDOWS_PER_BATCH):
        yield windows[start : start + WINDOWS_PER_BATCH]

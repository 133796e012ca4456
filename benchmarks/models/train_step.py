"""Whole training steps: forward, loss, backward, gradient clipping, fused AdamW; on a GPU bf16 by autocast, fp32 parameters.

All providers start from the same weights and see the same batch again and again. Before the timing, their losses must follow
those of the plain reference over three steps: who skips the backward pass or the optimizer keeps the first loss and is refused.

FLOPs are llm.c's convention, 6 N + 6 L C T a token (https://github.com/karpathy/llm.c, train_gpt2.cu), with N the parameters
once, position table included: causal attention counted half. nanoGPT's 6 (N - positions) + 12 L C T is 1.065 times that for
124M. Model FLOPs utilization is those FLOPs over the data sheet's dense bf16 peak.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import OURS, Absent, Benchmark, Candidate, Case, Work, Wrong, device, needs_cuda
from benchmarks.harness.op import interpreting
from benchmarks.models.nanogpt import from_fastgpt
from benchmarks.models.providers import (
    build,
    config,
    fast_book_model,
    free,
    on_kernels,
    on_reference,
    transformers_model,
)
from fastgpt import GPTConfig, GPTModel
from fastgpt.training import progress

Loss = Callable[[Tensor, Tensor], Tensor]

# (model, batch, context); larger models are in memory.py, at the largest batch that fits
SIZES = {
    "gpu": [("gpt2", batch, 1024) for batch in (32, 16, 64, 8)],
    "cpu": [("gpt2", 1, 128)],
    "dry": [("dry", 1, 8)],
}
# Steps whose losses are held to the reference's, with a rate at which each moves the loss by tenths.
PROOF_STEPS = 3
LEARNING_RATE = 3e-4
MICRO_BATCH = 8
PADDED_VOCABULARY = 64  # on a GPU, for every provider that can pad: products of 50,257 columns miss the fast paths


def flops_per_token(shape: GPTConfig, context: int) -> float:
    """llm.c's convention; the head is counted once, tied or not."""
    return progress.flops_per_token(shape.replace(tie_weights=True, vocab_multiple=1), context)


def cases(scale: str) -> Iterator[Case]:
    for name, batch, context in SIZES[scale]:
        size = {"model": name, "batch": batch, "context": context}
        yield Case("train_step", size, "", dtype_at(scale), work(name, batch, context), batch * context, "tokens")


def dtype_at(scale: str) -> str:
    return "bfloat16" if scale == "gpu" else "float32"


def work(name: str, batch: int, context: int) -> Work:
    """The floor's bytes: AdamW reads four and writes three tensors of fp32 parameters; activations are the model's affair."""
    state = 4.0 * config(name).num_parameters
    return Work(batch * context * flops_per_token(config(name), context), 4 * state, 3 * state)


def fresh(case: Case) -> GPTModel:
    multiple = PADDED_VOCABULARY if device().type == "cuda" else 1
    return build(case.size["model"], torch.float32, vocab_multiple=multiple).train()


def data(case: Case) -> tuple[Tensor, Tensor]:
    """The batch of a case: ids [B, T] and their next ids."""
    draw = torch.Generator().manual_seed(2)
    shape = case.size["batch"], case.size["context"] + 1
    ids = torch.randint(config(case.size["model"]).vocab_size, shape, generator=draw).to(device())
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def autocast(case: Case) -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=case.dtype == "bfloat16")


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """nanoGPT's: matrices and embeddings decay, biases and norms don't."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def step_of(module: nn.Module, loss: Loss, case: Case) -> Callable[[], Tensor]:
    """One training step as a function; gives the loss before it."""
    optimizer, (inputs, targets) = make_optimizer(module), data(case)

    def step() -> Tensor:
        with autocast(case):
            value = loss(inputs, targets)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


# The reference's losses of the case in hand.
_latest: list[tuple[Case, list[float]]] = []


def reference_losses(case: Case) -> list[float]:
    """Before each of PROOF_STEPS steps, in micro-batches, so that the largest batch fits."""
    if not _latest or _latest[0][0] != case:
        model = fresh(case)
        loss, optimizer, (inputs, targets) = on_reference(model.loss), make_optimizer(model), data(case)
        losses = []
        for _ in range(PROOF_STEPS):
            total = 0.0
            for part in zip(inputs.split(MICRO_BATCH), targets.split(MICRO_BATCH), strict=True):
                with autocast(case):
                    value = loss(*part) * (len(part[0]) / len(inputs))
                value.backward()
                total += value.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        _latest[:] = [(case, losses)]
        del model, optimizer
        free()
    return _latest[0][1]


def candidate(step: Callable[[], Tensor], case: Case) -> Candidate:
    """A sample is a step. The first PROOF_STEPS losses must be the reference's, and no later one may be that before it."""
    expected = reference_losses(case)
    losses: list[float] = []
    recent: list[Tensor] = []

    def run() -> Tensor:
        loss = step()
        recent[:] = [*recent[-1:], loss]
        if len(losses) < PROOF_STEPS:
            losses.append(loss.item())
        return loss

    def check(loss: Tensor) -> None:
        while len(losses) < PROOF_STEPS:
            run()
        fall = expected[0] - expected[-1]
        slack = (0.02 if case.dtype == "bfloat16" else 0.004) * expected[0]
        for i, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
            if not abs(ours - theirs) <= 0.1 * (expected[0] - theirs) + min(slack, 0.3 * fall):
                raise Wrong(f"losses {losses}, the reference's {expected}: step {i + 1} differs")
        before, last = (value.item() for value in recent)
        if before == last or not last < 1.5 * expected[0]:  # the batch is always the same: no update, the same loss
            raise Wrong(f"the loss came from {before} to {last}")

    return Candidate(run, check)


def prepare(make: Callable[[Case], tuple[nn.Module, Loss]], case: Case) -> Candidate:
    free()
    reference_losses(case)
    return candidate(step_of(*make(case), case), case)


def ours(case: Case) -> tuple[nn.Module, Loss]:
    model = fresh(case)
    return model, on_kernels(model.loss)


def ours_compiled(case: Case) -> tuple[nn.Module, Loss]:
    needs_cuda("torch.compile of a model")
    model = fresh(case)
    return model, _compiled(model.loss)


def reference(case: Case) -> tuple[nn.Module, Loss]:
    if device().type != "cuda" and not interpreting():
        raise Absent("it is what fastgpt runs on a CPU")
    model = fresh(case)
    return model, on_reference(model.loss)


def reference_compiled(case: Case) -> tuple[nn.Module, Loss]:
    needs_cuda("torch.compile of a model")
    model = fresh(case)
    return model, on_reference(_compiled(model.loss))


def nano(case: Case) -> tuple[nn.Module, Loss]:
    model = from_fastgpt(fresh(case)).train()
    return model, model


def nano_compiled(case: Case) -> tuple[nn.Module, Loss]:
    needs_cuda("torch.compile of a model")
    model, _ = nano(case)
    return model, _compiled(model)


def _transformers(case: Case) -> tuple[nn.Module, Callable[..., Any]]:
    unpadded = fresh(case)
    plain = build(case.size["model"], torch.float32)
    plain.load_state_dict(_unpadded(unpadded))
    peer = transformers_model(plain).train()
    for module in peer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return peer, peer


def transformers_eager(case: Case) -> tuple[nn.Module, Loss]:
    peer, forward = _transformers(case)
    return peer, _token_loss(lambda idx: forward(idx, use_cache=False).logits)


def transformers_compiled(case: Case) -> tuple[nn.Module, Loss]:
    needs_cuda("torch.compile of a model")
    peer, forward = _transformers(case)
    return peer, _compiled(_token_loss(lambda idx: forward(idx, use_cache=False).logits))


def fast_book(case: Case) -> tuple[nn.Module, Loss]:
    plain = build(case.size["model"], torch.float32, tie_weights=False)
    state = _unpadded(fresh(case))
    plain.load_state_dict({**state, "out_head.weight": state["tok_emb.weight"]})
    peer = fast_book_model(plain).train()
    peer.out_head.weight = peer.tok_emb.weight  # as GPT-2 has it, and as the losses are compared
    return peer, _token_loss(peer)


def fast_book_compiled(case: Case) -> tuple[nn.Module, Loss]:
    needs_cuda("torch.compile of a model")
    peer, loss = fast_book(case)
    return peer, _compiled(loss)


def _unpadded(model: GPTModel) -> dict[str, Tensor]:
    V = model.config.vocab_size
    tables = ("tok_emb.weight", "out_head.weight")
    return {name: tensor[:V] if name in tables else tensor for name, tensor in model.state_dict().items()}


def _token_loss(logits_of: Callable[[Tensor], Tensor]) -> Loss:
    def loss(idx: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits_of(idx).flatten(0, 1).float(), targets.flatten())

    return loss


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function)


MODELS = {
    OURS: ours,
    "fastgpt, compiled": ours_compiled,
    "reference": reference,
    "reference, compiled": reference_compiled,
    "nanoGPT": nano,
    "nanoGPT, compiled": nano_compiled,
    "transformers": transformers_eager,
    "transformers, compiled": transformers_compiled,
    "llms_from_scratch GPTModelFast": fast_book,
    "llms_from_scratch GPTModelFast, compiled": fast_book_compiled,
}
PROVIDERS = {name: functools.partial(prepare, make) for name, make in MODELS.items()}
BENCHMARKS = (Benchmark("train_step", "train", lambda scale: list(cases(scale)), PROVIDERS, rounds=4),)

"""AdamW as GPTs are trained with it, Muon beside it: nanoGPT's groups, and fp32 copies where parameters have 16 bits.

The groups are those of https://github.com/karpathy/nanoGPT/blob/master/model.py: what has two or more dimensions decays.
Muon makes a matrix's momentum orthogonal before it is added: https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """nanoGPT's rule: what has two or more dimensions decays, biases and norms don't."""
    return _groups([p for p in model.parameters() if p.requires_grad], weight_decay)


def configure_optimizers(
    model: nn.Module, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
) -> torch.optim.AdamW:
    """nanoGPT's `configure_optimizers` for any module: AdamW over its groups, fused on "cuda" and "cpu" where that is safe."""
    groups = optimizer_groups(model, weight_decay)
    fused = device_type in ("cuda", "cpu") and _dense(p for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


class Muon(NamedTuple):
    """torch.optim.Muon for the blocks' matrices.

    Its updates are scaled to the RMS that AdamW's have, so that AdamW's learning rate and weight decay do for it
    (https://arxiv.org/abs/2502.16982, equation 4).

    rate: its learning rate over AdamW's, at every step.
    """

    rate: float = 1.0
    momentum: float = 0.95


class Updater:
    """The update of a model's parameters, over micro-batches: after each backward `collect`, at the end `clip` and `step`.

    Args:
        model: those of its parameters that require a gradient are updated.
        masters: keep an fp32 copy of each parameter, gather gradients in fp32 and round the copy into the parameter after each
            update. The parameters may then become bf16, where an update below 1/256 of a weight would be lost.
        lr: a number, or a tensor on the device where the step is captured in a CUDA graph.
        muon: update the matrices of `trf_blocks` by Muon, and the rest by AdamW. None: AdamW for all.

    Raises ValueError where nothing is to be updated, or Muon is asked for and torch has none, or it has no matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        betas: tuple[float, float],
        lr: float | Tensor,
        masters: bool = False,
        muon: Muon | None = None,
    ) -> None:
        named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the model has no parameter that requires a gradient")
        self.parameters = list(named.values())
        self.masters = [p.detach().float().clone() for p in self.parameters] if masters else None
        self.updated = self.parameters if self.masters is None else self.masters
        device = self.updated[0].device
        matrices = [
            p
            for name, p in zip(named, self.updated, strict=True)
            if muon is not None and name.startswith("trf_blocks.") and p.dim() == 2
        ]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.updated if id(p) not in taken]
        self.optimizer = torch.optim.AdamW(
            _groups(rest, weight_decay),
            lr=lr,
            betas=betas,
            fused=device.type in ("cuda", "cpu") and _dense(rest),
            capturable=isinstance(lr, Tensor),
        )
        self._muon = None if muon is None else _muon(muon, matrices, weight_decay)
        self._rate = 1.0 if muon is None else muon.rate
        # Made now and not by the first step, so that a checkpoint has a place to be read into.
        self._state: list[dict[str, Tensor]] = []
        for p in self.updated:
            if self._muon is not None and id(p) in taken:
                state = {"momentum_buffer": torch.zeros_like(p)}
                self._muon.state[p] = state
            else:
                state = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
                self.optimizer.state[p] = state
            self._state.append(state)
        self._names = list(named)

    def set_lr(self, lr: float) -> None:
        """AdamW's, and Muon's at its ratio to it."""
        if self._muon is not None:
            self._muon.param_groups[0]["lr"] = lr * self._rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def collect(self) -> None:
        """After a backward pass: with masters, move the parameters' gradients into the masters' and free them."""
        if self.masters is None:
            return
        for p, master in zip(self.parameters, self.masters, strict=True):
            if p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

    def clip(self, most: float) -> Tensor:
        """The gradient's global norm before clipping it to `most` (0: no clipping); over all shards of sharded parameters."""
        norm = nn.utils.get_total_norm([p.grad for p in self.updated if p.grad is not None])
        # A CPU's norm can be read at no cost, and gradients that are short enough needn't be multiplied by one.
        short = type(norm) is Tensor and norm.device.type == "cpu" and bool(norm + 1e-6 <= most)
        if most > 0 and not short:
            nn.utils.clip_grads_with_norm_(self.updated, most, norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        if self._muon is not None:
            self._muon.step()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        """With masters, round them into the parameters."""
        if self.masters is not None:
            torch._foreach_copy_(self.parameters, self.masters)

    def zero_grad(self) -> None:
        for p in (*self.updated, *self.parameters):
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The live state by name: "model.tok_emb.weight" (of masters where there are any), "exp_avg.tok_emb.weight", ..."""
        found: dict[str, Tensor] = {}
        for name, p, state in zip(self._names, self.updated, self._state, strict=True):
            found[f"model.{name}"] = p.detach()
            found |= {f"{key}.{name}": value for key, value in state.items()}
        return found


def _muon(how: Muon, matrices: list[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"optimizer muon is torch.optim.Muon, of torch 2.9 and later; this is torch {torch.__version__}"
        )
    if not matrices:
        raise ValueError("optimizer muon found no matrix that requires a gradient in the model's trf_blocks")
    return torch.optim.Muon(matrices, weight_decay=weight_decay, momentum=how.momentum, adjust_lr_fn="match_rms_adamw")


def _dense(parameters: Iterable[Tensor]) -> bool:
    """Whether none has gaps between its rows, as thirds of a joined QKV have: torch's fused optimizers write over gaps."""
    return all(
        sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) < p.numel()
        for p in parameters
        if p.numel() > 0
    )


def _groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    every = list(parameters)
    return [
        {"params": [p for p in every if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]

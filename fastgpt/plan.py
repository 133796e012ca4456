"""The weights of a plain model, gathered once for whatever makes one token at a time without calling its modules.

`GPTModel` makes a Plan where it can: plain pre-norm blocks, in eval mode, without gradients. The weights are the parameters' own
memory: nothing is packed, so that a change in place is seen, and a replaced parameter is noticed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastgpt import ops

_M = TypeVar("_M", bound=nn.Module)


class BlockWeights(NamedTuple):
    """A block's parameters: norms (scale, shift or None); matrices as [in, out] views with their biases or None.

    With `scales` of the six matrices in order, they are int8 (fp32 [out]) or int4 (bf16 [out, in / group, 2]). `linears` are the
    modules that they are from.
    """

    norm1: tuple[Tensor, Tensor | None]
    qkv: list[tuple[Tensor, Tensor | None]]
    out: tuple[Tensor, Tensor | None]
    norm2: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    scales: tuple[Tensor, ...] | None = None
    linears: tuple[nn.Module, ...] = ()

    def flat(self) -> list[Tensor | None]:
        """In the order of fastgpt_kernels.decode_token.LayerWeights, matrices as [out, in]."""
        matrices = [*self.qkv, self.out, self.up, self.down]
        flat = [t for weight, bias in matrices for t in (weight.T, bias)]
        return [*self.norm1, *flat[:8], *self.norm2, *flat[8:]]


class TokenWeights(NamedTuple):
    """What a token reads besides the blocks: tables [V, C] and [P, C], final norm, head [V, C] with its bias or None."""

    tokens: Tensor
    positions: Tensor
    norm: tuple[Tensor, Tensor | None]
    head: tuple[Tensor, Tensor | None]
    head_scale: Tensor | None = None  # of an int8 or int4 head


def plain(module: nn.Module, kind: type[_M]) -> TypeGuard[_M]:
    """Exactly a `kind`, with nothing that calling it would run besides its own forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not (hooks or "forward" in module.__dict__)  # accelerate puts its hooks there


def idle(dropout: nn.Module) -> bool:
    """Whether it is a plain nn.Dropout that drops nothing."""
    return plain(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0.0)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x); of a plain nn.Linear on a CPU as the op, which may know a faster product."""
    if x.device.type == "cpu" and plain(module, nn.Linear):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


class Unchanged:
    """What must stay for something made of a module's parts to stay true: its modules, parameters and buffers.

    Gathering those parts costs a millisecond a token at 12 layers; `holds` looks at them in a tenth of that. Values may change in
    place at any time.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        # Not the root: plans and engines are kept by it, weakly, and would keep it alive.
        self._modules = [(module, type(module)) for module in modules[1:] if plain(module, type(module))]
        self._children = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._tensors = [
            (owned, name, t, t.data_ptr())
            for m in modules
            for owned in (m._parameters, m._buffers)
            for name, t in owned.items()
            if t is not None
        ]

    def holds(self) -> bool:
        """Whether every module, parameter and parameter's memory is still the one gathered, and no hook was added."""
        return (
            all(plain(module, kind) for module, kind in self._modules)
            and all(children.get(name) is child for children, name, child in self._children)
            and all(owned.get(name) is t and t.data_ptr() == at for owned, name, t, at in self._tensors)
        )


class Plan(Unchanged):
    """The weights of all blocks, which are the parameters' own memory; `holds` says whether they are the model's still."""

    def __init__(self, root: nn.Module, blocks: list[BlockWeights], token: TokenWeights | None = None) -> None:
        super().__init__(root)
        self.blocks, self.token = blocks, token

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """All of them but the scales."""
        token = (
            () if self.token is None else (self.token.tokens, self.token.positions, *self.token.norm, *self.token.head)
        )
        return [t for t in (*(t for block in self.blocks for t in block.flat()), *token) if t is not None]

    @functools.cached_property
    def contiguous(self) -> bool:
        """Whether every matrix lies in memory as a Linear's own does."""
        return all(t.is_contiguous() for t in self.tensors)

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether a matrix is int8 or int4."""
        return any(t.dtype in (torch.int8, torch.uint8) for t in self.tensors)

    @functools.cached_property
    def obstacle(self) -> str | None:
        """Why no engine can run from these weights, or None."""
        if self.token is None:
            return "the embeddings, the final norm or the head are not the model's own plain modules"
        if any(t.dtype == torch.uint8 for t in self.tensors):
            return "int4 weights are read on a CPU alone"
        if self.quantized and (self.token.head_scale is None or any(block.scales is None for block in self.blocks)):
            return "some matrices are int8 and others are not"
        dtypes, devices = {t.dtype for t in self.tensors} - {torch.int8}, {t.device for t in self.tensors}
        if len(dtypes) > 1 or len(devices) > 1:
            return f"the parameters are not of one dtype and device: {sorted(map(str, dtypes | devices))}"
        return None

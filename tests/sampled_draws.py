"""What tests of the fused sampler share: its noise by Philox and float64 written down once more, and what to compare with."""

from __future__ import annotations

import importlib
import sys
import unittest.mock

import torch

from fastgpt.inference.sampling import SamplingParams, filtered

module = importlib.import_module("fastgpt_kernels.sampling")
FILTERS = {
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.05},
}


def shorter_lists(ours, columns, together):
    """Rows sorted in lists of so many columns, searched in groups of so many columns, of a mutant as well."""
    return unittest.mock.patch.multiple(sys.modules[ours.filter_limits.__module__], _LIST=columns, _TOGETHER=together)


def kept_logits(ours, logits, seen=None, temperature=None, penalty=None, *, top_k=None, top_p=None, min_p=None):
    """What the kernels' limits say that `draw` keeps: fp32 [B, V] on the CPU, -inf where dropped."""
    x, limits = (each.cpu() for each in ours.filter_limits(logits, seen, temperature, penalty, top_k, top_p))
    t, cut, top = limits[:, :, None].unbind(1)
    kept = (x > t) | ((x == t) & (torch.arange(x.shape[1]) >= cut))
    if min_p is not None:
        kept &= (x - top).exp() >= min_p
    return torch.where(kept, x, -torch.inf)


def compare_filters(ours, logits, **filters):
    """Exactly the tokens that the reference keeps, with their logits as they are."""
    expected = last_of_equals(logits.float().cpu(), SamplingParams(1.0, **filters))
    assert torch.equal(kept_logits(ours, logits, **filters), expected)


def last_of_equals(logits, params):
    """What the reference keeps; of equals which top-p cuts through, and which torch.sort leaves in any order, the last."""
    kept = filtered(logits, params)
    for row, values in zip(kept, logits, strict=True):
        least = row[row > -torch.inf].min()
        equals, stay = (values == least).nonzero()[:, 0], int((row == least).sum())
        row[equals[: len(equals) - stay]], row[equals[len(equals) - stay :]] = -torch.inf, least
    return kept


def penalised(logits, seen, temperature, penalty):
    x = logits.float()
    return torch.where(seen, torch.where(x < 0, x * penalty, x / penalty), x) / temperature


# Philox4x32 (Salmon et al., 2011) in Python's integers, with 7 rounds as tests/kernels hold dropout to.
def philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(7):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def gumbel(seed: int, row: int, position: int, V: int) -> torch.Tensor:
    words = [
        w for block in range(-(-V // 4)) for w in philox([block, 0, position, row], [seed & 0xFFFFFFFF, seed >> 32])
    ]
    u = (torch.tensor(words[:V], dtype=torch.float64) + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


def noise_arguments(seed: int, rows: int, device, first: int = 0):
    positions = torch.arange(first, first + rows, dtype=torch.int32, device=device)
    return torch.tensor([seed], device=device), positions


def compare_draws(ours, logits, device, **options):
    """The token with the largest sum of logit and noise, in float64."""
    seed = 0x123456789ABCDEF
    seen = options.get("seen")
    x = logits if seen is None else penalised(logits, seen, 1.0, options["repetition_penalty"])
    x = x / options["temperature"]
    kept = last_of_equals(
        x, SamplingParams(1.0, **{k: options[k] for k in ("top_k", "top_p", "min_p") if k in options})
    )
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    tokens = ours.sample_tokens(logits.to(device), *noise_arguments(seed, len(logits), device, 100), **on_device)
    for row, token in enumerate(tokens.tolist()):
        scores = kept[row].double() + gumbel(seed, row, 100 + row, logits.shape[1])
        first, second = scores.topk(2).values.tolist()
        assert token == scores.argmax().item() or first - second < 1e-4

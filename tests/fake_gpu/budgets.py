"""How often the host may wait for the device, and upload to it: a call, and for each token, step or batch of it.

A scenario that does more fails, with the line of everything that it did. A blocking upload, and any upload of pageable memory,
counts as one; a pinned one that nobody waits for is counted apart.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from fake_gpu.trace import PINNED, READ, STAGED, UPLOAD, Trace

# Tokens that generation makes between two looks of the host (fastgpt.inference.generate.LOOK_EVERY).
LOOK = Fraction(1, 16)


class Budget(NamedTuple):
    """At most; `each_…` is for every unit of the call."""

    reads: int = 0
    uploads: int = 0
    pinned: int = 0
    captures: int = 0
    each_reads: int | Fraction = 0
    each_uploads: int | Fraction = 0
    each_pinned: int | Fraction = 0

    def check(self, seen: Trace, units: int = 0) -> None:
        """AssertionError with what was done where, if it is more."""
        limits = {
            "reads": (self.reads + math.ceil(self.each_reads * units), (READ,)),
            "uploads": (self.uploads + math.ceil(self.each_uploads * units), (UPLOAD, STAGED)),
            "pinned uploads": (self.pinned + math.ceil(self.each_pinned * units), (PINNED,)),
        }
        over = [
            f"{seen.count(*kinds)} {name}, at most {most}:\n{seen.told(*kinds)}"
            for name, (most, kinds) in limits.items()
            if seen.count(*kinds) > most
        ]
        if seen.captures > self.captures:
            over.append(f"{seen.captures} captures, at most {self.captures}")
        assert not over, "\n".join(over)


# A whole call. Up go prompts, their lengths (the cache's too, where they are several), and whose turn it is, for an engine that
# draws by itself; the first token is read by itself.
_CALL = Budget(captures=1, pinned=4, reads=1, each_reads=LOOK)
GENERATION = {
    "greedy": _CALL,
    "greedy, stop tokens": _CALL._replace(pinned=5),
    "fused sampling": _CALL._replace(pinned=6),  # what the penalty has seen, stop tokens
    "torch's sampler": _CALL._replace(pinned=2),
    "torch's sampler, penalty": _CALL._replace(pinned=3),
    "torch's sampler, stop tokens": _CALL._replace(pinned=2, each_reads=1),
    "logprobs": _CALL._replace(reads=2, each_reads=2 * LOOK),
    "streamed": _CALL._replace(each_reads=1),
    "no cache": Budget(each_reads=1, each_pinned=1),
    "past the context": _CALL._replace(each_reads=1, each_pinned=1),
    "prompt lookup": _CALL._replace(each_reads=1, each_pinned=2),
    "modules": _CALL._replace(captures=0),
}

# With a KV cache: lengths go to the device where rows get several of them.
CACHE = {
    "made": Budget(),
    "forward": Budget(),
    "forward, rows of several lengths": Budget(),
    "truncated": Budget(pinned=1),
}

TRAINING = {
    "step": Budget(each_pinned=3),  # ids, targets, and what each micro-batch counts
    "step of packed documents": Budget(each_pinned=4),  # where they begin, too
    "log": Budget(reads=1),
    "validation": Budget(reads=1, each_pinned=2),
    "validation of packed documents": Budget(reads=1, each_pinned=3),
    "sample": _CALL,
    "evaluation": Budget(reads=1, each_pinned=3),  # inputs, targets, and which positions count
}

# Their callers hand over ids on the device, which are read, and get ids there back, which go up.
_BOTH_WAYS = _CALL._replace(reads=2, pinned=5)
COMPAT = {
    "the book's loss": Budget(pinned=2),
    "the book's losses": Budget(reads=1, each_pinned=2),
    "the book's cached call": Budget(),
    "the book's generation": _BOTH_WAYS,
    "the book's generation, end of text": _BOTH_WAYS._replace(each_reads=1),
    "nanoGPT's generation": _BOTH_WAYS,
    "nanoGPT's generation again": _BOTH_WAYS._replace(captures=0),
    "from_hf's generation": _CALL,
    "a padding mask": Budget(reads=1),  # once for a mask, whatever calls have it
}

NONE = Budget()

"""What each kernel of a token asks L2 for: every byte once, as far ahead as was said, in as many pieces as it has programs."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from fastgpt_kernels._ahead import plan

DISTANCE = 40_000


def kernels():
    """Of two layers and a head, whose matrices don't end where others begin."""
    sizes = [((3000, 3000, 3000), 12), ((3000,), 4), ((12_000,), 8), ((12_000,), 4)] * 2 + [((100_000,), 50)]
    return [([torch.empty(n * 2, dtype=torch.int8) for n in given], programs) for given, programs in sizes]


def asked(made, found):
    """[bytes of the stream that each kernel asks for], as positions in the stream."""
    stream = [(m.data_ptr(), m.numel()) for matrices, _ in made for m in matrices]
    begins = [0, *accumulate(size for _, size in stream)]
    positions = []
    for kernel in range(len(made)):
        pieces, count = found.of(kernel)
        bytes_ = []
        for address, size in pieces[:count].tolist():
            (matrix,) = (i for i, (at, length) in enumerate(stream) if at <= address < at + length)
            assert address + size <= sum(stream[matrix]), "no piece goes on behind its matrix"
            assert address % 16 == size % 16 == 0 < size
            bytes_ += range(
                begins[matrix] + address - stream[matrix][0], begins[matrix] + address - stream[matrix][0] + size
            )
        positions.append(bytes_)
    return positions, begins[-1]


def test_every_byte_is_asked_for_once_and_ahead():
    made = kernels()
    found = plan(made, DISTANCE, torch.device("cpu"))
    positions, total = asked(made, found)
    everything = [byte for bytes_ in positions for byte in bytes_]
    assert len(everything) == len(set(everything))
    # only the head reads more than the distance itself, and what it reads at once nobody needs to ask for
    assert total - len(everything) == pytest.approx(200_000 - DISTANCE, abs=16 * 20)
    ends = list(accumulate(sum(m.numel() for m in matrices) for matrices, _ in made))
    for (begin, end), bytes_ in zip(zip([0, *ends], ends, strict=False), positions, strict=True):
        ahead = [(byte - begin) % total for byte in bytes_]
        assert min(ahead) >= min(DISTANCE, end - begin), "not what the kernel reads itself"
        assert min(ahead) >= DISTANCE - 16 or end - begin > DISTANCE
        assert max(ahead) < DISTANCE + end - begin
    assert all(0 < count <= programs for count, (_, programs) in zip(found.counts, made, strict=True))


def test_no_distance_is_no_plan():
    assert plan(kernels(), 0, torch.device("cpu")) is None


def test_a_distance_of_more_than_half_of_the_stream_is_half_of_it():
    made = kernels()
    positions, total = asked(made, plan(made, 10**9, torch.device("cpu")))
    assert min(positions[0]) == pytest.approx(total // 2, abs=16)

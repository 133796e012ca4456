"""Attention's walked tiles as boxes of tensor descriptors: where they are, and what a descriptor can't have."""

from __future__ import annotations

import pytest
import torch
from attention_problems import backward, compare, forward, problem, run, small_blocks
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt_kernels import _launch, attention, packed_attention

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


def described(launch: _launch.Launch) -> list[TensorDescriptor]:
    return [argument for argument in launch.args if isinstance(argument, TensorDescriptor)]


@pytest.mark.parametrize(
    ("arch", "dtype", "head_size", "counts"),
    [
        (90, torch.bfloat16, 64, [2, 0, 4]),
        (100, torch.float16, 80, [4, 0, 8]),  # a head of 64 + 16 columns
        (90, torch.float32, 64, [0, 0, 0]),
        (80, torch.bfloat16, 64, [0, 0, 0]),
        (120, torch.bfloat16, 64, [0, 0, 0]),
    ],
)
def test_boxes_where_products_are_asynchronous(arch, dtype, head_size, counts):
    with _launch.record(arch) as launches:
        run(attention, *problem(1, 2, 70, 90, head_size, dtype))
    assert [len(described(launch)) for launch in launches] == counts


def test_a_packed_projection_is_described_where_it_lies():
    qkv = torch.randn(2, 40, 3, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    with _launch.record(90) as launches:
        packed_attention(qkv).sum().backward()
    inside = {qkv.data_ptr() + 2 * 128 * i for i in range(3)}
    assert {box.base.data_ptr() for box in described(launches[0])} < inside
    assert {box.base.data_ptr() for box in described(launches[2])} > inside  # dout lies elsewhere


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)


ODD = {
    "rows of 200 bytes": (100, lambda x: x),
    "rows of 2 bytes": (1, lambda x: x),
    "an unaligned beginning": (16, _unaligned),
    "unaligned packed heads": (20, lambda x: _unaligned(x.transpose(1, 2)).transpose(1, 2)),
    "one head for all": (16, lambda x: x[:, :1].expand(x.shape)),
}


@pytest.mark.parametrize("name", ODD)
def test_what_a_descriptor_cannot_have_is_copied(name, device, monkeypatch):
    monkeypatch.setattr(forward, "_fwd_blocks", None)
    monkeypatch.setattr(backward, "_bwd_blocks", None)
    small_blocks(forward, backward)
    head_size, lay_out = ODD[name]
    q, k, v, dout = problem(2, 2, 37, 53, head_size, torch.float16, device)
    tensors = [q, lay_out(k), lay_out(v), dout]
    compare(attention, tensors)
    with _launch.record(90) as launches:
        run(attention, *tensors)
    boxes = [box for launch in launches for box in described(launch)]
    assert len(boxes) == 6
    for box in boxes:
        assert box.base.data_ptr() % 16 == 0
        assert all(stride > 0 and 2 * stride % 16 == 0 for stride in box.strides[:-1])


@pytest.mark.parametrize("empty", [(0, 2, 3, 3), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_nothing_has_no_descriptor(empty):
    with _launch.record(90) as launches:
        run(attention, *problem(*empty, 16, torch.float16))
    assert not any(described(launch) for launch in launches)

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_accurate_as_torch
from layouts import LAYOUTS
from mutants import mutant

from fastgpt_kernels.embedding import embedding

module = importlib.import_module("fastgpt_kernels.embedding")  # the package has a function of that name

# numpy, which the interpreter computes with, warns where a GPU overflows silently
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [torch.float32, torch.float16]


def reference(idx, tok_weight, pos_weight, offset=0):
    return F.embedding(idx, tok_weight) + pos_weight[offset : offset + idx.shape[1]].to(tok_weight.dtype)


def run(op, idx, weights, dy, **options):
    weights = [w.detach().requires_grad_() for w in weights]
    y = op(idx, *weights, **options)
    return [y.detach(), *torch.autograd.grad(y, weights, dy)]


def compare(ours, reference_op, idx, weights, dy, names=("y", "dtok_weight", "dpos_weight"), **options):
    exact = run(reference_op, idx, [w.double() for w in weights], dy.double())
    theirs = run(reference_op, idx, weights, dy)
    for name, o, t, e in zip(names, run(ours, idx, weights, dy, **options), theirs, exact, strict=True):
        assert_as_accurate_as_torch(o, t, e, name)


def problem(shape, width, dtype, device, vocabulary=11, positions=13):
    idx = torch.randint(vocabulary, shape, device=device)
    weights = [torch.randn(n, width, device=device).to(dtype) for n in (vocabulary, positions)]
    return idx, weights, torch.randn(*shape, width, device=device).to(dtype)


def compare_with_dropout(ours, idx, weights, dy, offset=0, p=0.5):
    """Extract the mask, then replay forward and backward in float64 with the mask as a constant."""
    options = {"dropout_p": p, "seed": 5, "offset": offset}
    mask = ours(idx, torch.ones_like(weights[0]), torch.zeros_like(weights[1]), **options)
    assert torch.isin(mask, torch.tensor([0.0, 1 / (1 - p)], device=mask.device)).all()
    assert mask.numel() < 20 or mask.unique().numel() == 2
    # a sum of d rounds d first, in torch as here, so the exact sums are those of the rounded d
    d = dy * mask
    y, dtok, dpos = run(ours, idx, weights, dy, **options)
    plain = functools.partial(reference, offset=offset)
    exact = run(plain, idx, [w.double() for w in weights], d.double())
    theirs = run(plain, idx, weights, d)
    assert_as_accurate_as_torch(y, theirs[0] * mask, exact[0] * mask, "y")
    assert_as_accurate_as_torch(dtok, theirs[1], exact[1], "dtok_weight")
    assert_as_accurate_as_torch(dpos, theirs[2], exact[2], "dpos_weight")


def by_positions(positions):
    return lambda idx, tok, pos: F.embedding(idx, tok) + F.embedding(positions, pos).to(tok.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((1, 1), 1), ((3, 5), 7), ((2, 9), 768)], ids=str)
def test_positions_of_each_token(shape, width, dtype, device):
    idx, weights, dy = problem(shape, width, dtype, device)
    positions = torch.randint(13, shape, device=device, dtype=torch.int32)
    compare(embedding, by_positions(positions), idx, weights, dy, positions=positions)
    options = {"dropout_p": 0.5, "seed": 5}
    mask = embedding(idx, torch.ones_like(weights[0]), torch.zeros_like(weights[1]), **options)

    def dropped(idx, *weights):
        return by_positions(positions)(idx, *weights) * mask.to(weights[0].dtype)

    compare(embedding, dropped, idx, weights, dy, positions=positions, **options)


def test_positions_that_count_up_are_an_offset(device):
    idx, weights, dy = problem((3, 5), 7, torch.float32, device)
    positions = torch.arange(2, 7, device=device).expand(3, 5)
    given, counted = run(embedding, idx, weights, dy, positions=positions), run(embedding, idx, weights, dy, offset=2)
    assert torch.equal(given[0], counted[0])
    torch.testing.assert_close(given, counted)


def test_positions_outside_the_table_give_nan_and_no_gradient(device):
    idx, weights, dy = problem((1, 4), 7, torch.float32, device)
    positions = torch.tensor([[0, 13, -1, 2]], device=device)
    y, dtok, dpos = run(embedding, idx, weights, dy, positions=positions)
    assert y.isnan().all(-1).tolist() == [[False, True, True, False]]
    assert torch.equal(dpos[[0, 2]], dy[0, [0, 3]])
    assert not dpos[[1, *range(3, 13)]].any()
    torch.testing.assert_close(dtok.sum(0), dy[0, [0, 3]].sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((1, 1), 1), ((3, 5), 7), ((5, 13), 63), ((2, 9), 768)], ids=str)
def test_embedding(shape, width, dtype, device):
    idx, weights, dy = problem(shape, width, dtype, device)
    compare(embedding, reference, idx, weights, dy)
    compare_with_dropout(embedding, idx, weights, dy)


def test_offset_int32_and_weights_of_two_dtypes(device):
    idx, (tok, pos), dy = problem((3, 5), 63, torch.float32, device)
    plain = functools.partial(reference, offset=8)
    compare(embedding, plain, idx.int(), [tok, pos], dy, offset=8)
    compare_with_dropout(embedding, idx, [tok, pos], dy, offset=3)
    y, _, dpos = run(embedding, idx, [tok.half(), pos], dy.half())
    assert (y.dtype, dpos.dtype) == (torch.float16, torch.float32)


def test_dropout_draws(device):
    ones = torch.ones(50, 40, device=device)
    idx = torch.zeros(2, 50, dtype=torch.int64, device=device)
    draw = functools.partial(embedding, idx, ones, ones * 0, 0.2)
    first = draw(seed=1)
    assert torch.equal(first, draw(seed=1))
    assert not torch.equal(first, draw(seed=2))
    assert abs((first != 0).double().mean().item() - 0.8) < 4 * (0.16 / first.numel()) ** 0.5
    torch.manual_seed(3)
    drawn = draw()
    assert not torch.equal(drawn, draw())
    torch.manual_seed(3)
    assert torch.equal(drawn, draw())
    assert not embedding(idx, ones, ones, 1.0).any()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "first two transposed"])
def test_layouts(layout, device):
    idx, weights, dy = problem((3, 5), 66, torch.float32, device)
    compare(embedding, reference, idx, [LAYOUTS[layout](w) for w in weights], LAYOUTS[layout](dy))
    compare_with_dropout(embedding, idx.T.contiguous().T, weights, LAYOUTS[layout](dy))


def test_unknown_tokens_and_special_values(device):
    idx, (tok, pos), dy = problem((3, 5), 7, torch.float32, device)
    tok[4, 2], tok[5, 3], idx[1, :2] = torch.nan, torch.inf, torch.tensor([4, 5])
    compare(embedding, reference, idx, [tok, pos], dy)
    idx[0, :2] = torch.tensor([-1, 11])
    y, dtok, _ = run(embedding, idx, [tok, pos], dy)
    assert y[0, :2].isnan().all()
    torch.testing.assert_close(y[2:], reference(idx[2:], tok, pos), rtol=0, atol=0, equal_nan=True)
    known = (idx >= 0) & (idx < 11)
    torch.testing.assert_close(dtok, torch.zeros_like(tok).index_add_(0, idx[known], dy[known]))


@pytest.mark.parametrize(("shape", "width"), [((0, 5), 7), ((3, 0), 7), ((3, 5), 0)], ids=str)
def test_empty(shape, width, device):
    compare(embedding, reference, *problem(shape, width, torch.float32, device))


def test_gradcheck(device):
    idx, weights, _ = problem((2, 3), 5, torch.float64, device)
    op = functools.partial(embedding, idx, dropout_p=0.5, seed=1, offset=2)
    assert torch.autograd.gradcheck(op, [w.requires_grad_() for w in weights], fast_mode=True)


def test_opcheck(device):
    idx, (tok, pos), dy = problem((3, 5), 7, torch.float32, device)
    for p, seed in ((0.0, None), (0.5, torch.ones(1, dtype=torch.int64, device=device))):
        for positions in (None, idx):
            torch.library.opcheck(module.embedding_fwd.op, (idx, tok, pos, p, seed, 2, positions))
        torch.library.opcheck(module.embedding_bwd.op, (dy, pos, p, seed, 2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compile(device):
    idx, weights, dy = problem((3, 5), 18, torch.float32, device)
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True)
    options = {"dropout_p": 0.5, "seed": 3}
    for ours, expected in zip(
        run(compiled, idx, weights, dy, **options), run(embedding, idx, weights, dy, **options), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_second_backward_raises(device):
    idx, (tok, pos), _ = problem((3, 5), 7, torch.float32, device)
    tok.requires_grad_()
    (dtok,) = torch.autograd.grad(embedding(idx, tok, pos).square().sum(), tok, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dtok.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"idx": torch.ones(3, 5)}, "idx must be int32 or int64"),
        ({"idx": torch.ones(3, dtype=torch.int64)}, r"idx must be int32 or int64 \[B, T\]"),
        ({"tok_weight": torch.ones(11, 8)}, r"got \[11, 8\] and \[13, 7\]"),
        ({"pos_weight": torch.ones(13, 7, dtype=torch.int32)}, "pos_weight must be float16"),
        ({"offset": 9}, r"positions 9 \.\. 13 don't fit pos_weight of 13 rows"),
        ({"offset": -1}, r"positions -1"),
        (
            {"positions": torch.zeros(3, 2, dtype=torch.int64)},
            r"positions must be int32 or int64 \[\d+, 5\], got torch.int64",
        ),
        ({"dropout_p": -0.1}, "dropout_p must be between 0 and 1"),
    ],
)
def test_bad_input(change, message, device):
    idx, (tok, pos), _ = problem((3, 5), 7, torch.float32, device)
    arguments = {"idx": idx, "tok_weight": tok, "pos_weight": pos} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        embedding(**arguments)


def far_rows(ours, device):
    """Weights whose rows are 2**30 elements apart, of which an int32 offset reaches two: the third wraps to before the first.

    The storage covers that place too, so that a mutant reads wrong values instead of crashing. Untouched memory costs nothing.
    """
    storage = torch.empty(2**32 + 64, dtype=torch.float16, device=device)
    weight = storage.as_strided((3, 64), (2**30, 1), 2**31)
    weight.copy_(torch.randn(3, 64))
    storage[:64] = 1.0
    idx = torch.tensor([[2, 0, 1], [1, 2, 2]], dtype=torch.int32, device=device)
    near = weight.clone()
    torch.testing.assert_close(ours.embedding(idx, weight, weight), reference(idx, near, near), rtol=0, atol=0)


def test_offsets_beyond_int32(device):
    far_rows(module, device)


@pytest.mark.parametrize(
    "mutation",
    [
        ("idx_ptr + rows, mask=rows < M, other=0).to(tl.int64)", "idx_ptr + rows, mask=rows < M, other=0)"),
        ("% T + offset).to(tl.int64)", "% T + offset)"),
    ],
)
def test_int32_offsets_are_caught(mutation, device):
    with pytest.raises(AssertionError):
        far_rows(mutant("embedding", *mutation), device)


def small_problem(ours, device):
    for shape, width in (((3, 13), 300), ((3, 5), 63)):
        idx, weights, dy = problem(shape, width, torch.float32, device)
        compare(ours.embedding, reference, idx, weights, dy)
        compare_with_dropout(ours.embedding, idx, weights, dy, offset=13 - shape[1])


MUTANTS = {
    "offset forgotten": (" % T + offset", " % T"),
    "offset forgotten in the backward": ("dpos_ptr + (t + offset) * C", "dpos_ptr + t * C"),
    "position of the flat index": ("[:, None]) % T + offset", "[:, None]) % (T - 1) + offset"),
    "another mask in the backward": ("dropout(d, seed,", "dropout(d, seed + 1,"),
    "last sequence lost": ("tl.range(0, B, num", "tl.range(0, B - 1, num"),
    "positions from d before dropout": (
        "            d = dropout(d",
        "            dpos += d\n            d = dropout(d",
    ),
    "tokens from dy": ("d = dy if seed is None else d\n", "d = dy\n"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, device):
    with pytest.raises(AssertionError):
        small_problem(mutant("embedding", *MUTANTS[name]), device)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1600])
def test_bfloat16_at_gpt2_shapes(width, device):
    idx, weights, dy = problem((8, 1024), width, torch.bfloat16, device, vocabulary=50257, positions=1024)
    compare(embedding, reference, idx, weights, dy)
    compare_with_dropout(embedding, idx, weights, dy)


@pytest.mark.gpu
def test_repeats_are_bit_equal(device):
    idx, weights, dy = problem((8, 1024), 768, torch.bfloat16, device, vocabulary=97, positions=1024)
    first = run(embedding, idx, weights, dy, dropout_p=0.1, seed=1)
    for _ in range(250):
        for a, b in zip(run(embedding, idx, weights, dy, dropout_p=0.1, seed=1), first, strict=True):
            assert torch.equal(a, b)

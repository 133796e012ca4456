"""Batches by counter: what an epoch covers, that a batch depends on its number alone, and what bad files say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastgpt.text.data import TokenStream, encode_documents, encode_with_starts, split_validation
from fastgpt.text.documents import find, read_text
from fastgpt.text.tokenizer import BytePairTokenizer, SymbolTokenizer

BYTES = {bytes([b]): b for b in range(256)}


def epoch(stream: TokenStream, number: int) -> list[torch.Tensor]:
    """The input rows of one epoch, for a stream with batch_size 1."""
    first = number * stream.blocks_per_epoch
    return [stream.batch(step)[0][0] for step in range(first, first + stream.blocks_per_epoch)]


def test_targets_are_the_next_tokens():
    tokens = np.random.default_rng(0).integers(0, 101, 500).astype(np.uint16)
    positions = TokenStream(np.arange(500), context=7, batch_size=3, seed=5)
    stream = TokenStream(tokens, context=7, batch_size=3, seed=5)
    for step in range(100):
        where, _ = positions.batch(step)
        inputs, targets = stream.batch(step)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == tokens[where.numpy()].tolist()
        assert targets.tolist() == tokens[where.numpy() + 1].tolist()


@pytest.mark.parametrize("context", [1, 2, 5, 16])
@pytest.mark.parametrize("extra", [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 100, 257])
def test_an_epoch_sees_each_token_once_but_for_less_than_two_blocks_at_the_ends(context, extra):
    count = context + extra
    stream = TokenStream(np.arange(count), context, batch_size=1, seed=3)
    for number in range(4):
        seen = sorted(torch.cat(epoch(stream, number)).tolist())
        assert seen == list(range(seen[0], seen[-1] + 1))
        assert 0 <= count - 1 - len(seen) < 2 * context
        assert seen[-1] <= count - 2  # the last token is a target only


def test_rows_follow_each_other_across_batches_and_epochs():
    narrow = TokenStream(np.arange(200), context=6, batch_size=1, seed=1)
    wide = TokenStream(np.arange(200), context=6, batch_size=7, seed=1)
    rows = [narrow.batch(step) for step in range(7 * 20)]
    for step in range(20):
        inputs, targets = wide.batch(step)
        assert inputs.tolist() == [row[0][0].tolist() for row in rows[7 * step : 7 * step + 7]]
        assert targets.tolist() == [row[1][0].tolist() for row in rows[7 * step : 7 * step + 7]]


def test_a_batch_is_a_function_of_its_number():
    stream = TokenStream(np.arange(300), context=8, batch_size=4, seed=2)
    inputs = {step: stream.batch(step)[0].tolist() for step in range(30)}
    np.random.seed(99)
    torch.manual_seed(99)
    for step in (29, 0, 17, 17, 3, 28):
        assert stream.batch(step)[0].tolist() == inputs[step]
        assert TokenStream(np.arange(300), 8, 4, seed=2).batch(step)[0].tolist() == inputs[step]


def test_batches_draw_nothing_from_the_global_generators():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    TokenStream(np.arange(300), context=8, batch_size=4).batch(12)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_epochs_and_seeds_have_their_own_orders_and_offsets():
    orders = [
        tuple(int(row[0]) for row in epoch(TokenStream(np.arange(400), 8, 1, seed), number))
        for seed, number in itertools.product(range(3), range(3))
    ]
    assert len(set(orders)) == 9
    assert len({min(order) for order in orders}) > 3


def test_every_token_is_an_input_some_day():
    stream = TokenStream(np.arange(100), context=16, batch_size=1, seed=0)
    seen = {token for number in range(60) for row in epoch(stream, number) for token in row.tolist()}
    assert seen == set(range(99))


def test_a_memory_map_of_the_largest_ids(tmp_path):
    values = np.arange(65536 - 90, 65536, dtype=np.uint16)
    values.tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    inputs, targets = TokenStream(tokens, context=40, batch_size=1).batch(0)
    assert (targets - inputs).unique().tolist() == [1]
    assert inputs.min() >= 65536 - 90
    assert targets.max() <= 65535


def test_batches_are_copies():
    tokens = np.arange(100)
    inputs, _ = TokenStream(tokens, context=9, batch_size=1).batch(0)
    inputs.zero_()
    assert tokens.tolist() == list(range(100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(8), 8, 1, 0), "8 tokens are fewer than one block of 9"),
        ((np.arange(0), 8, 1, 0), "0 tokens are fewer than one block of 9"),
        ((np.arange(99), 0, 1, 0), "context must be at least 1, got 0"),
        ((np.arange(99), 8, 0, 0), "batch_size must be at least 1, got 0"),
        ((np.arange(99), 8, 1, -1), "seed must be at least 0, got -1"),
    ],
)
def test_bad_streams_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenStream(*arguments)


def test_the_smallest_stream_gives_its_one_block():
    inputs, targets = TokenStream(np.arange(9), context=8, batch_size=2).batch(5)
    assert inputs.tolist() == [list(range(8))] * 2
    assert targets.tolist() == [list(range(1, 9))] * 2


def test_a_negative_step_is_named():
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        TokenStream(np.arange(99), 8, 1).batch(-1)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_is_read_as_it_is_but_for_a_byte_order_mark(tmp_path, mark):
    content = "line\r\n naïve\ufeff 🙂\x00\n"
    (tmp_path / "text").write_bytes((mark + content).encode())
    assert read_text(tmp_path / "text") == content


@pytest.mark.parametrize(
    ("content", "byte", "position"),
    [(b"a\xff", "0xff", "1"), (b"x" * 1234 + b"\xc3(", "0xc3", "1,234"), (b"\xed\xa0\x80", "0xed", "0")],
)
def test_bytes_that_are_no_utf8_are_named_with_file_and_position(tmp_path, content, byte, position):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt is not UTF-8: byte {byte} at position {position}$"):
        read_text(tmp_path / "bad.txt")


def test_documents_end_with_end_of_text_where_there_is_one():
    pairs = BytePairTokenizer.from_ranks(BYTES)
    assert encode_documents(pairs, ["ab", "", "c"]).tolist() == [97, 98, 256, 256, 99, 256]
    symbols = SymbolTokenizer("char", ["a", "b", "c"])
    assert encode_documents(symbols, ["ab", "", "c"]).tolist() == [0, 1, 2]
    assert encode_documents(pairs, []).tolist() == []


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_fit_their_type(size, dtype):
    tokenizer = SymbolTokenizer("char", [chr(0x10000 + n) for n in range(size)])
    tokens = encode_documents(tokenizer, [chr(0x10000) + chr(0x10000 + size - 1)])
    assert tokens.tolist() == [0, size - 1]
    assert tokens.dtype == dtype


@pytest.mark.parametrize(
    ("count", "fraction", "at_least", "held"),
    [(1000, 0.1, 10, 100), (1000, 0.001, 33, 33), (1000, 0.0, 0, 1), (66, 0.02, 33, 33)],
)
def test_the_end_is_held_out(count, fraction, at_least, held):
    training, validation = split_validation(np.arange(count), fraction, at_least)
    assert training.tolist() == list(range(count - held))
    assert validation.tolist() == list(range(count - held, count))


@pytest.mark.parametrize(("count", "fraction", "at_least"), [(65, 0.02, 33), (100, 0.6, 1), (0, 0.1, 0)])
def test_too_little_to_hold_out_is_named(count, fraction, at_least):
    held = max(math.floor(count * fraction), at_least, 1)
    with pytest.raises(ValueError, match=rf"{count} tokens are too few to hold {held} out"):
        split_validation(np.arange(count), fraction, at_least)


def test_directories_become_their_files_in_order(tmp_path):
    for name in ("z/b.txt", "z/a.txt", "z/deep/c.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = [str(path.relative_to(tmp_path)) for path in find([tmp_path / "z", tmp_path / "a.txt"]).files]
    assert files == ["z/a.txt", "z/b.txt", "z/deep/c.txt", "a.txt"]
    with pytest.raises(FileNotFoundError, match=r"no file or directory at '.*missing'"):
        find([tmp_path / "a.txt", tmp_path / "missing"])


# Documents apart.

LENGTHS = [1, 5, 17, 0, 40, 2, 16, 33, 1]  # with a context of 16: 0, 1, 1, 0, 3, 1, 1, 2, 0 rows


def apart(batch_size: int = 1, seed: int = 0) -> TokenStream:
    starts = np.cumsum([0, *LENGTHS[:-1]])
    return TokenStream(np.arange(1, sum(LENGTHS) + 1), context=16, batch_size=batch_size, seed=seed, starts=starts)


def test_rows_hold_one_document_each_and_all_of_them():
    stream = apart()
    assert stream.blocks_per_epoch == 9
    expected, first = set(), 1
    for length in LENGTHS:
        document = list(range(first, first + length))
        for start in range(0, max(length - 1, 0), 16):
            expected.add(tuple(document[start : start + 17]))
        first += length
    for number in range(3):
        seen = set()
        for step in range(9 * number, 9 * number + 9):
            inputs, targets = (row[0] for row in stream.batch(step))
            kept = int((targets != -100).sum())
            assert inputs[kept:].tolist() == [0] * (16 - kept)
            assert (targets[kept:] == -100).all()
            assert inputs[1:kept].tolist() == targets[: kept - 1].tolist()
            seen.add((*inputs[:kept].tolist(), int(targets[kept - 1])))
        assert seen == expected


def test_documents_apart_come_in_an_order_of_their_own_each_epoch():
    orders = {
        tuple(int(apart(1, seed).batch(step)[0][0, 0]) for step in range(9 * e, 9 * e + 9))
        for e in (0, 1)
        for seed in (0, 1)
    }
    assert len(orders) == 4
    assert [row.tolist() for row in apart(3).batch(4)[0]] == [
        apart().batch(step)[0][0].tolist() for step in (12, 13, 14)
    ]


def test_rows_are_parts_of_the_batch():
    for stream in (apart(6), TokenStream(np.arange(300), 8, 6, seed=2)):
        whole = stream.batch(7)
        parts = [stream.rows(7, first, first + 2) for first in (0, 2, 4)]
        for i in (0, 1):
            assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([], "must ascend from 0"),
        ([1, 2], "must ascend from 0"),
        ([0, 5, 3], "must ascend from 0"),
        ([0, 11], "a document begins at 11, after the last of 10 tokens"),
        (list(range(10)), "none of 10 documents has two tokens"),
    ],
)
def test_bad_starts_are_named(starts, message):
    with pytest.raises(ValueError, match=message):
        TokenStream(np.arange(10), 4, 1, starts=np.array(starts, dtype=np.int64))


def test_documents_with_their_starts():
    pairs = BytePairTokenizer.from_ranks(BYTES)
    tokens, starts = encode_with_starts(pairs, ["ab", "", "c"])
    assert tokens.tolist() == encode_documents(pairs, ["ab", "", "c"]).tolist()
    assert starts.tolist() == [0, 3, 4]
    tokens, starts = encode_with_starts(pairs, [])
    assert (tokens.tolist(), starts.tolist()) == ([], [])

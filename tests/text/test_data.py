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

LENGTHS = [1, 5, 17, 0, 40, 2, 16, 33, 1]  # 107 tokens to predict: with a context of 16, 7 rows and 5 places of padding
FIRSTS = np.cumsum([0, *LENGTHS[:-1]])


def apart(batch_size: int = 1, seed: int = 0) -> TokenStream:
    return TokenStream(np.arange(1, sum(LENGTHS) + 1), 16, batch_size, seed, starts=FIRSTS)


def pieces(inputs: torch.Tensor, targets: torch.Tensor, starts: torch.Tensor) -> list[list[int]]:
    """The runs of a row that see each other, each with its last target; padding is none."""
    found = []
    for begin in starts.unique().tolist():
        part = starts == begin
        assert part.nonzero()[0].item() == begin
        if (targets[part] != -100).all():
            assert inputs[part][1:].tolist() == targets[part][:-1].tolist()
            found.append([*inputs[part].tolist(), int(targets[part][-1])])
        else:
            assert not inputs[part].any()
            assert (targets[part] == -100).all()
    return found


def test_packed_rows_predict_each_token_of_every_document_once_an_epoch():
    stream = apart()
    assert stream.blocks_per_epoch == 7
    expected = [
        (token, token + 1)
        for first, length in zip(FIRSTS, LENGTHS, strict=True)
        for token in range(first + 1, first + length)
    ]
    for number in range(4):
        seen, padded = [], []
        for step in range(7 * number, 7 * number + 7):
            inputs, targets, starts = (row[0] for row in stream.batch(step))
            padded.append(int((targets == -100).sum()))
            for piece in pieces(inputs, targets, starts):
                assert piece == list(range(piece[0], piece[-1] + 1))
                seen += itertools.pairwise(piece)
        assert sorted(seen) == expected
        assert sorted(padded) == [0] * 6 + [5]


def test_a_document_that_fits_into_what_is_left_of_a_row_is_whole():
    whole = {tuple(range(first + 1, first + n + 1)) for first, n in zip(FIRSTS, LENGTHS, strict=True) if n > 1}
    found, cut = set(), 0
    for step in range(7):
        inputs, targets, starts = (row[0] for row in apart().batch(step))
        for piece in pieces(inputs, targets, starts):
            found.add(tuple(piece))
            cut += tuple(piece) not in whole
            # What is cut begins or ends with its row.
            assert tuple(piece) in whole or int(inputs[0]) == piece[0] or int(targets[-1]) == piece[-1]
    assert len(found & whole) >= 3
    assert cut <= 2 * 7


def test_padding_is_under_three_hundredths_of_documents_as_long_as_web_pages():
    lengths = np.random.default_rng(0).lognormal(6.2, 1.1, 400).astype(np.int64) + 1  # a median of 490 tokens
    firsts = np.cumsum(lengths) - lengths
    stream = TokenStream(np.ones(lengths.sum(), np.uint16), 1024, 1, starts=firsts)
    rows = [stream.batch(step) for step in range(stream.blocks_per_epoch)]
    padding = sum(int((targets == -100).sum()) for _, targets, _ in rows)
    assert padding / (1024 * len(rows)) < 0.03
    assert 1024 * len(rows) - padding == (lengths - 1).sum()
    assert max(len(starts.unique()) for *_, starts in rows) > 4


def test_documents_apart_come_in_an_order_of_their_own_each_epoch():
    orders = {
        tuple(apart(1, seed).batch(step)[0].tolist()[0][0] for step in range(7 * e, 7 * e + 7))
        for e in (0, 1)
        for seed in (0, 1)
    }
    assert len(orders) == 4


def test_a_packed_batch_is_a_function_of_its_number():
    stream = apart(3)
    batches = {step: stream.batch(step) for step in range(12)}
    for step in (11, 0, 7, 7, 2, 10):
        for other in (stream.batch(step), apart(3).batch(step)):
            assert all(torch.equal(a, b) for a, b in zip(other, batches[step], strict=True))
        narrow = [apart().batch(row) for row in range(3 * step, 3 * step + 3)]
        assert all(torch.equal(torch.cat([row[i] for row in narrow]), batches[step][i]) for i in range(3))


def test_ranks_predict_different_tokens_and_together_all():
    stream, seen = apart(7), []
    for rank in (0, 1):
        inputs, targets, _ = stream.rows(2, 3 * rank, 3 + 4 * rank)
        seen.append(set(inputs[targets != -100].tolist()))
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 107


def test_rows_are_parts_of_the_batch():
    for stream in (apart(6), TokenStream(np.arange(300), 8, 6, seed=2)):
        whole = stream.batch(7)
        parts = [stream.rows(7, first, first + 2) for first in (0, 2, 4)]
        for i in range(len(whole)):
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

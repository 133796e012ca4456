"""Text and ids: beside tiktoken and Hugging Face's tokenizers, back and forth, and in pieces."""

from __future__ import annotations

import importlib.util

import pytest
import tiktoken
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, trainers
from tokenizers_of_a_corpus import BYTES, CHARS, CORPUS, HARD, PAIRS, WORDS

from fastgpt.text import tokenizer as tokenizer_module
from fastgpt.text.tokenizer import END_OF_TEXT, GPT2_PATTERN, BytePairTokenizer, SymbolTokenizer, train_byte_pairs

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
example, given, settings, st = hypothesis.example, hypothesis.given, hypothesis.settings, hypothesis.strategies
BYTE_IDS = [PAIRS.encoding.encode_single_token(bytes([b])) for b in range(256)]
small = settings(deadline=None, derandomize=True, max_examples=60, database=None)


@pytest.fixture(scope="module")
def hub() -> HubTokenizer:
    """Hugging Face's own GPT-2 pre-tokenizer and training on the same texts."""
    learner = HubTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    )
    return learner


def test_ids_are_those_of_hugging_faces_training(hub):
    assert PAIRS.n_vocab == 400
    for text in CORPUS + HARD:
        assert PAIRS.encode(text) == hub.encode(text).ids, text
    assert max(len(PAIRS.encoding.decode_single_token_bytes(i)) for i in range(399)) > 4


@small
@given(st.text(alphabet=st.sampled_from("ab e'st\n\t 1é日🙂"), max_size=40))
def test_ids_are_tiktokens(text):
    plain = tiktoken.Encoding(
        "plain", pat_str=GPT2_PATTERN, mergeable_ranks=PAIRS.encoding._mergeable_ranks, special_tokens={}
    )
    assert PAIRS.encode(text) == plain.encode_ordinary(text)


@small
@given(st.text(max_size=60))
@example("<|endoftext|>")
@example("👩‍👩‍👧 \x00 \u2028")
def test_text_comes_back(text):
    ids = PAIRS.encode(text)
    assert PAIRS.decode(ids) == text
    assert all(0 <= i < PAIRS.end_of_text for i in ids)


@small
@given(st.text(alphabet="".join(sorted(set("".join(CORPUS)))), max_size=60))
def test_text_of_known_symbols_comes_back(text):
    assert CHARS.decode(CHARS.encode(text)) == text


@pytest.mark.parametrize("text", [text for text in HARD if "endoftext" not in text] + CORPUS)
def test_words_come_back(text):
    words = SymbolTokenizer.from_text("word", text or "x")
    assert words.decode(words.encode(text)) == text


def test_character_ids_are_nanogpts():
    text = "".join(CORPUS)
    chars = sorted(set(text))
    assert CHARS.encode(text) == [chars.index(character) for character in text]
    assert CHARS.n_vocab == len(chars)


def test_words_numbers_spaces_and_marks_are_symbols():
    words = SymbolTokenizer.from_text("word", "b a_1,  b\n\n(a)")
    assert words.symbols == sorted(["b", " ", "a_1", ",", "  ", "\n\n", "(", "a", ")"])
    assert [words.symbols[i] for i in words.encode("(b,  a)\n\n")] == ["(", "b", ",", "  ", "a", ")", "\n\n"]


@pytest.mark.parametrize(
    ("tokenizer", "text", "symbol"),
    [(CHARS, "the √", "√"), (WORDS, "the zebra", "zebra"), (CHARS, "\ud800", r"\\ud800")],
)
def test_unknown_symbols_are_named(tokenizer, text, symbol):
    with pytest.raises(ValueError, match=f"'{symbol}' is not among the {tokenizer.n_vocab} symbols"):
        tokenizer.encode(text)


def test_lone_surrogates_become_replacement_characters():
    assert PAIRS.decode(PAIRS.encode("a\ud800b")) == "a\ufffdb"
    lone = SymbolTokenizer.from_text("char", "a\ud800")
    assert lone.decode(lone.encode("a\ud800")) == "a?"


@pytest.mark.parametrize("tokenizer", [PAIRS, CHARS, WORDS], ids=["bpe", "char", "word"])
def test_ids_outside_the_vocabulary_are_named(tokenizer):
    for token in (-1, tokenizer.n_vocab, 2**31, 2**70, -(2**70)):
        with pytest.raises(ValueError, match=rf"token id {token} is outside the vocabulary of {tokenizer.n_vocab}"):
            tokenizer.decode_bytes([0, token])
        assert tokenizer.decode([0, token, 0]) == f"{tokenizer.decode([0])}\ufffd{tokenizer.decode([0])}"
    assert tokenizer.decode([0])


def test_an_unknown_id_ends_a_character_that_was_on_its_way():
    euro = list("€".encode())  # three tokens of one byte
    assert BytePairTokenizer.from_ranks(BYTES).decode([*euro[:2], 5000, *euro]) == "\ufffd\ufffd€"


def test_special_tokens_only_when_asked():
    text = f"a{END_OF_TEXT}b<|pad|>"
    two = BytePairTokenizer.from_ranks(BYTES, special_tokens={END_OF_TEXT: 256, "<|pad|>": 300})
    spelled = list(text.encode())
    assert two.encode(text) == spelled
    assert two.encode(text, allowed_special={END_OF_TEXT}) == [97, 256, 98, *b"<|pad|>"]
    assert two.encode(text, allowed_special={"<|pad|>", END_OF_TEXT}) == [97, 256, 98, 300]
    assert two.encode(text, allowed_special=two.encoding.special_tokens_set) == two.encoding.encode(
        text, allowed_special="all"
    )
    assert two.decode([97, 256, 98, 300]) == text
    assert (two.end_of_text, two.n_vocab) == (256, 301)
    assert (PAIRS.end_of_text, PAIRS.n_vocab) == (399, 400)


@pytest.mark.parametrize("allowed", ["all", END_OF_TEXT, {"<|pad|>"}, ["<|pad|>", END_OF_TEXT]])
def test_special_tokens_that_are_not_there_are_named(allowed):
    with pytest.raises(ValueError, match=r"allowed_special must be a set of \['<\|endoftext\|>'\], got"):
        PAIRS.encode("a", allowed_special=allowed)
    with pytest.raises(ValueError, match=r"allowed_special must be a set of \[\], got"):
        CHARS.encode("a", allowed_special=allowed)


@small
@given(st.lists(st.integers(0, 399), max_size=30))
@example([0xE2, 0x82])
@example([0xE2, 0x82, 0x41, 0xFF, 0x41])
def test_a_stream_of_any_ids_adds_up_to_their_text(ids):
    ids = [BYTE_IDS[i] if i < 256 else i for i in ids]
    stream = PAIRS.stream()
    pieces = [stream.add(i) for i in ids]
    raw = b"".join(PAIRS.encoding.decode_single_token_bytes(i) for i in ids)
    assert "".join(pieces) + stream.finish() == raw.decode("utf-8", errors="replace") == PAIRS.decode(ids)


@pytest.mark.parametrize("text", ["🙂", "a🙂b👩‍👩‍👧", "naïve 日本語 🇳🇴"])
def test_a_stream_never_shows_half_a_character(text):
    plain = BytePairTokenizer.from_ranks(BYTES)
    stream, shown = plain.stream(), ""
    for i in plain.encode(text):
        piece = stream.add(i)
        assert "\ufffd" not in piece
        shown += piece
        assert text.startswith(shown)
    assert (shown, stream.finish()) == (text, "")


def test_a_cut_character_shows_at_the_end_once():
    plain = BytePairTokenizer.from_ranks(BYTES)
    stream = plain.stream()
    assert [stream.add(i) for i in "é🙂".encode()[:-1]] == ["", "é", "", "", ""]
    assert (stream.finish(), stream.finish()) == ("\ufffd", "")


def pieces_of(text: str, characters: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", characters)
        return list(tokenizer_module._pieces(text))


@small
@given(st.text(alphabet=st.sampled_from("  \n\n\n\tab1!'s\r\u00a0\x1cé"), max_size=80), st.integers(1, 20))
@example("aaaaaa \nb", 2)
@example("aaaaaa\n\nb", 2)
@example("aaaaaa\n b", 2)
@example("aaaaaa\nb\nc\n", 2)
@example("aaaaaa\n", 2)
def test_long_texts_give_the_ids_of_one_piece(text, characters):
    whole = PAIRS.encoding.encode_ordinary(text)
    special = PAIRS.encoding.encode(text, allowed_special="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", characters)
        assert PAIRS.encode(text) == whole
        assert PAIRS.encode(text, allowed_special={END_OF_TEXT}) == special
    assert "".join(pieces_of(text, characters)) == text


def test_long_texts_are_cut_into_pieces():
    text = "".join(f"line {n}\n" for n in range(1000))
    pieces = pieces_of(text, 100)
    assert 60 < len(pieces) < 100
    assert max(map(len, pieces)) <= 110
    assert pieces_of(text, len(text)) == [text]


def test_a_piece_too_long_for_tiktoken_is_an_error_and_the_process_goes_on():
    with pytest.raises(ValueError, match=r"tiktoken can't encode a piece of 2,200,000 characters"):
        PAIRS.encode(" " * 2_200_000)
    assert PAIRS.decode(PAIRS.encode("fine")) == "fine"


def test_training_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match=r"at least 257 \(256 bytes and <\|endoftext\|>\), got 256"):
        train_byte_pairs(CORPUS, 256)
    plain = train_byte_pairs(CORPUS, 257)
    assert (plain.n_vocab, plain.end_of_text) == (257, 256)
    assert plain.decode(plain.encode("any text, naïve 🙂")) == "any text, naïve 🙂"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tokenizers: pip install 'fastgpt-triton\[hf\]'"):
        train_byte_pairs(CORPUS, 300)


def test_training_is_the_same_each_time():
    first, second = (train_byte_pairs(iter(CORPUS), 400).encoding._mergeable_ranks for _ in range(2))
    assert first == second

"""Text and ids: beside tiktoken and Hugging Face's tokenizers, back and forth, in pieces, and from bad files."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
import re

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

from fastgpt.text import tokenizer as tokenizer_module
from fastgpt.text.tokenizer import (
    END_OF_TEXT,
    FILE,
    GPT2_PATTERN,
    RANKS,
    BytePairTokenizer,
    SymbolTokenizer,
    Tokenizer,
    load_tokenizer,
    read_ranks,
    train_byte_pairs,
)

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
example, given, settings, st = hypothesis.example, hypothesis.given, hypothesis.settings, hypothesis.strategies

CORPUS = [
    "def forward(self, x):\n    return self.norm(x + self.attention(x))\n\n\nclass Model:\n    pass\n" * 4,
    "It's the first time they've seen that; we'll say 1234 things, and naïve cafés don't matter.  Über 🙂🙂 alles!\n"
    * 4,
    "日本語のテキスト、日本語のモデル。\t\t\r\n   the end of the line   \n" * 4,
]
HARD = [
    *(
        "",
        " ",
        "\n",
        "\n\n \n",
        "a  b",
        "  \t x\n\n y ",
        "It's we'll THEY'VE",
        "1234567890",
        "日本語",
        "naïve",
        "\u0301e\u0301",
    ),
    *(
        "🙂👩‍👩‍👧🇳🇴",
        "\x00\x1f\x7f",
        "\u00a0\u2003\u2028x",
        "<|endoftext|>",
        "a<|endoftext|>b",
        "#!?...",
        "\ufffd\ufeff",
    ),
]
BYTES = {bytes([b]): b for b in range(256)}
PAIRS = train_byte_pairs(CORPUS, 400)
CHARS = SymbolTokenizer.from_text("char", "".join(CORPUS))
WORDS = SymbolTokenizer.from_text("word", "".join(CORPUS))
BYTE_IDS = [PAIRS.encoding.encode_single_token(bytes([b])) for b in range(256)]
small = settings(deadline=None, derandomize=True, max_examples=60, database=None)


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    PAIRS.save(directory)
    return directory / RANKS


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


def test_ids_are_those_of_the_merges_that_transformers_finds_in_the_saved_ranks(ranks_file):
    converted = TikTokenConverter(vocab_file=str(ranks_file), pattern=GPT2_PATTERN).converted()
    for text in CORPUS + HARD:
        assert PAIRS.encode(text) == converted.encode(text, add_special_tokens=False).ids, text


@small
@given(st.text(alphabet=st.sampled_from("ab e'st\n\t 1é日🙂"), max_size=40))
def test_ids_are_tiktokens(text):
    plain = tiktoken.Encoding(
        "plain", pat_str=GPT2_PATTERN, mergeable_ranks=PAIRS.encoding._mergeable_ranks, special_tokens={}
    )
    assert PAIRS.encode(text) == plain.encode_ordinary(text)


def test_the_saved_ranks_are_what_tiktoken_reads(ranks_file):
    assert load_tiktoken_bpe(str(ranks_file)) == PAIRS.encoding._mergeable_ranks == read_ranks(ranks_file)


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
            tokenizer.decode([0, token])
    assert tokenizer.decode([0])


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


def same(ours: Tokenizer, theirs: Tokenizer) -> bool:
    texts = [ours.decode(random.Random(seed).choices(range(ours.n_vocab), k=50)) for seed in range(20)]
    if isinstance(ours, SymbolTokenizer):
        texts = CORPUS
    return all(ours.encode(text) == theirs.encode(text) for text in texts) and all(
        ours.decode([i]) == theirs.decode([i]) for i in range(ours.n_vocab)
    )


@pytest.mark.parametrize(
    "tokenizer",
    [
        PAIRS,
        CHARS,
        WORDS,
        SymbolTokenizer.from_text("char", "".join(CORPUS) + '\ud800\x00"\\'),
        BytePairTokenizer.from_ranks(BYTES, pattern=r"\s?\S+|\s", special_tokens={"<a>": 256, "<b>": 257}),
        BytePairTokenizer.from_ranks(BYTES, special_tokens={}),
    ],
    ids=["bpe", "char", "word", "odd characters", "own pattern", "no special"],
)
def test_every_kind_is_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    for source in (tmp_path / "a", str(tmp_path / "a"), tmp_path / "a" / FILE):
        loaded = load_tokenizer(source)
        assert type(loaded) is type(tokenizer)
        assert (loaded.n_vocab, loaded.end_of_text) == (tokenizer.n_vocab, tokenizer.end_of_text)
        assert same(tokenizer, loaded)
    loaded.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_special_tokens_come_back_with_a_saved_tokenizer(tmp_path):
    ours = BytePairTokenizer.from_ranks(BYTES, special_tokens={"<a>": 256, END_OF_TEXT: 300})
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("<a>x", allowed_special={"<a>"}) == [256, 120]
    assert (loaded.end_of_text, loaded.n_vocab) == (300, 301)


def test_ranks_with_a_gap_come_back(tmp_path):
    # p50k_base: "<|endoftext|>" is 50256, between ranks
    ranks = BYTES | {b"th": 257, b"the": 258}
    BytePairTokenizer(
        tiktoken.Encoding("gap", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    ).save(tmp_path)
    for source in (tmp_path, tmp_path / RANKS):
        loaded = load_tokenizer(source)
        assert loaded.encode("the th") == [258, 32, 257]
        assert (loaded.end_of_text, loaded.n_vocab) == (256, 259)


def test_a_rank_file_alone_is_a_tokenizer(ranks_file):
    loaded = load_tokenizer(ranks_file)
    assert same(PAIRS, loaded)
    assert loaded.end_of_text == 399


def test_gpt2_is_saved_by_name(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: asked.append(name) or PAIRS.encoding)
    tokenizer = load_tokenizer("gpt2")
    tokenizer.save(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == [FILE]
    (tmp_path / "bare").mkdir()
    for source in (tmp_path / "saved", tmp_path / "saved" / FILE, tmp_path / "bare"):
        assert load_tokenizer(source).encode("the end") == PAIRS.encode("the end")
    assert asked == ["gpt2"] * 4


@pytest.mark.parametrize("cache", [None, "/nowhere"])
def test_gpt2_that_cannot_be_fetched_names_the_cause_and_the_way_out(monkeypatch, tmp_path, cache):
    def unreachable(name: str) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    if cache is None:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache)
    (tmp_path / FILE).write_text('{"kind": "gpt2"}')
    for source in ("gpt2", tmp_path):
        with pytest.raises(ValueError, match=r"GPT-2 vocabulary.*name resolution failed.*TIKTOKEN_CACHE_DIR") as caught:
            load_tokenizer(source)
        assert f"(now {cache!r})" in str(caught.value)
        assert "not a tokenizer file" not in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_no_tokenizer_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at '.*absent'; expected"):
        load_tokenizer(tmp_path / "absent")


def lines(ranks: dict[bytes, int]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"dGhl", "expected a base64 token and its rank, got b'dGhl'"),
        (b"dGhl 256 7", "expected a base64 token"),
        (b"dGhl x", "expected a base64 token"),
        (b"d-hl 256", "expected a base64 token"),
        (b"dGh 256", "expected a base64 token"),
        (b"dG-hl 256", "expected a base64 token"),
        (b"\xff\xfe\x00", "expected a base64 token"),
        (b"dGhl " + b"9" * 5000, "expected a base64 token"),
        (b"YQ== 256", r"the token b'a' or its rank 256 came before"),
        (b"dGhl 97", r"the token b'the' or its rank 97 came before"),
    ],
)
def test_bad_lines_of_a_rank_file_are_named(tmp_path, line, message):
    path = tmp_path / "some.tiktoken"
    path.write_bytes(b"\n".join([*lines(BYTES)[:255], b"", line, *lines(BYTES)[255:]]))
    with pytest.raises(ValueError, match=rf"some\.tiktoken, line 257: .*{message}"):
        load_tokenizer(path)


def test_blank_lines_and_windows_line_ends_are_nothing(tmp_path):
    path = tmp_path / "some.tiktoken"
    path.write_bytes(b"\r\n".join([b"", *lines(BYTES | {b"the": 256}), b"", b""]))
    assert load_tokenizer(path).encode("the") == [256]
    assert read_ranks(path) == load_tiktoken_bpe(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lack 256 of the 256 single bytes"),
        (b"\n".join(lines(BYTES)[:-2]), r"lack 2 of the 256 single bytes, b'\\xfe' first"),
        (b"\n".join([*lines(BYTES), b"dGhl -1"]), r"each once; b'the' has -1"),
        (b"\n".join([*lines(BYTES), b"dGhl 9999999999"]), r"under 2,097,152, each once; b'the' has 9999999999"),
    ],
)
def test_bad_rank_files_are_named(tmp_path, content, message):
    path = tmp_path / "some.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.tiktoken is not a tokenizer file: .*{message}"):
        load_tokenizer(path)


BPE = {"kind": "tiktoken", "pattern": GPT2_PATTERN, "special_tokens": {END_OF_TEXT: 256}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "Expecting property name"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        ("[" * 100_000, "[Rr]ecursion|[Ss]tack"),
        ("[1, 2]", "indices must be integers"),
        ("3", "not subscriptable"),
        ({}, "it lacks 'kind'"),
        ({"kind": "wordpiece"}, "kind must be 'gpt2', 'tiktoken', 'char' or 'word', got 'wordpiece'"),
        ({"kind": []}, r"kind must be .*, got \[\]"),
        ({"kind": "char"}, "it lacks 'symbols'"),
        ({"kind": "char", "symbols": []}, "at least one"),
        ({"kind": "char", "symbols": ["a", "b", "a"]}, "each once; got 3, 2 of them different"),
        ({"kind": "char", "symbols": [1, 2]}, r"symbols must be a list of texts, got \[1, 2\]"),
        ({"kind": "word", "symbols": "abc"}, "symbols must be a list of texts, got 'abc'"),
        ({"kind": "word", "symbols": ["a", ""]}, "symbols must be a list of texts"),
        ({"kind": "char", "symbols": {"a": 1}}, "symbols must be a list of texts"),
        ({**BPE, "pattern": "("}, "Parsing error"),
        ({**BPE, "pattern": 3}, "'int' object is not an instance of 'str'|cannot be converted"),
        ({"kind": "tiktoken", "special_tokens": {}}, "it lacks 'pattern'"),
        ({"kind": "tiktoken", "pattern": "x"}, "it lacks 'special_tokens'"),
        ({**BPE, "special_tokens": ["<a>"]}, r"special_tokens must map texts to ids, got \['<a>'\]"),
        ({**BPE, "special_tokens": {"": 256}}, "special_tokens must map texts to ids"),
        ({**BPE, "special_tokens": {"<a>": 97}}, "each once; '<a>' has 97"),
        ({**BPE, "special_tokens": {"<a>": 256, "<b>": 256}}, "each once; '<b>' has 256"),
        ({**BPE, "special_tokens": {"<a>": -1}}, "'<a>' has -1"),
        ({**BPE, "special_tokens": {"<a>": 10**12}}, "'<a>' has 1000000000000"),
        ({**BPE, "special_tokens": {"<a>": "256"}}, "'<a>' has '256'"),
        ({**BPE, "special_tokens": {"<a>": True}}, "'<a>' has True"),
        ({**BPE, "special_tokens": {"<a>": 256.0}}, r"'<a>' has 256\.0"),
    ],
)
def test_bad_tokenizer_files_are_named_and_the_process_goes_on(tmp_path, settings, message):
    BytePairTokenizer.from_ranks(BYTES).save(tmp_path)
    good = (tmp_path / FILE).read_bytes()
    content = json.dumps(settings) if isinstance(settings, dict) else settings
    (tmp_path / FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{FILE} is not a tokenizer file: (.|\n)*({message})"):
        load_tokenizer(tmp_path)
    (tmp_path / FILE).write_bytes(good)
    assert load_tokenizer(tmp_path).encode("ab") == [97, 98]


def test_ranks_missing_beside_their_settings_are_named(tmp_path):
    BytePairTokenizer.from_ranks(BYTES).save(tmp_path)
    (tmp_path / RANKS).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(RANKS)):
        load_tokenizer(tmp_path)


def test_bad_symbols_are_named():
    with pytest.raises(ValueError, match="kind must be 'char' or 'word', got 'byte'"):
        SymbolTokenizer("byte", ["a"])
    with pytest.raises(ValueError, match="at least one"):
        SymbolTokenizer.from_text("char", "")


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

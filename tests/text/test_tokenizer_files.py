"""Tokenizers saved and loaded, and files that are none."""

from __future__ import annotations

import base64
import json
import random
import re

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers_of_a_corpus import BYTES, CHARS, CORPUS, HARD, PAIRS, WORDS
from transformers.convert_slow_tokenizer import TikTokenConverter

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
)


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    PAIRS.save(directory)
    return directory / RANKS


def test_ids_are_those_of_the_merges_that_transformers_finds_in_the_saved_ranks(ranks_file):
    converted = TikTokenConverter(vocab_file=str(ranks_file), pattern=GPT2_PATTERN).converted()
    for text in CORPUS + HARD:
        assert PAIRS.encode(text) == converted.encode(text, add_special_tokens=False).ids, text


def test_the_saved_ranks_are_what_tiktoken_reads(ranks_file):
    assert load_tiktoken_bpe(str(ranks_file)) == PAIRS.encoding._mergeable_ranks == read_ranks(ranks_file)


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
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {FILE, "tokenizer.json", "tokenizer_config.json"}
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

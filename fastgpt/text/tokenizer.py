"""Text to ids and back: GPT-2's byte-pair encoding, any tiktoken rank file, characters or words.

Text is encoded as ordinary text: the string "<|endoftext|>" in a prompt becomes the characters it is made of, unless the
special token is asked for by `allowed_special`. Decoding is incremental where wanted and never emits half a character.

A saved tokenizer is `fastgpt_tokenizer.json`, with the ranks of a byte-pair encoding beside it in `tokenizer.tiktoken`
(tiktoken's format: a base64 token and its rank a line), and `tokenizer.json` with `tokenizer_config.json` for transformers and
what is built on it. Other programs' tokenizers are read by fastgpt.text.formats.
"""

from __future__ import annotations

import base64
import codecs
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt.config import MAX_SIZES
from fastgpt.files import BUNDLED, write_text
from fastgpt.text import formats
from fastgpt.text.formats import GPT2_PATTERN, BytePairs

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

FILE = "fastgpt_tokenizer.json"
RANKS = "tokenizer.tiktoken"

# A prompt or file longer than this is cut into pieces at line ends before encoding: tiktoken's regular expressions keep a stack
# that one huge piece can exhaust (https://github.com/openai/tiktoken/issues/400).
PIECE_CHARACTERS = 1_000_000


class Tokenizer:
    """Text <-> token ids.

    Attributes:
        n_vocab: ids run from 0 to n_vocab - 1.
        end_of_text: the id of "<|endoftext|>", or None where there is none (character and word level).
    """

    n_vocab: int
    end_of_text: int | None

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of `text`; special tokens are recognized only if named in `allowed_special`, a set of them."""
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids; ValueError for an id outside the vocabulary. A cut may fall inside a character."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `load_tokenizer(directory)` reads."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD, and so does an id that the vocabulary lacks (models are padded)."""
        stream = self.stream()
        return "".join([stream.add(token) for token in ids]) + stream.finish()

    def stream(self) -> StreamDecoder:
        """A decoder to feed with ids one by one."""
        return StreamDecoder(self)

    def _outside(self, token: int) -> ValueError:
        return ValueError(f"token id {token} is outside the vocabulary of {self.n_vocab}")

    def _check_special(self, allowed: Collection[str], known: Collection[str]) -> None:
        if not set(allowed) <= set(known):
            raise ValueError(f"allowed_special must be a set of {sorted(known)}, got {allowed!r}")


class StreamDecoder:
    """Text of ids as they come; a character whose bytes are spread over several ids appears when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that `token` completes; may be empty. U+FFFD for an id that the vocabulary lacks."""
        try:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        except ValueError:
            return self.finish() + "\ufffd"

    def finish(self) -> str:
        """What is left over: U+FFFD if the last character never became whole."""
        return self._utf8.decode(b"", final=True)


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken.

    Args:
        encoding: a tiktoken.Encoding.
        name: "gpt2" for OpenAI's vocabulary; None for one that has to be saved with the model.
        added: those of its special tokens that are tokens wherever they stand in a text.
        end: the special token that ends a text.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        name: str | None = None,
        added: Collection[str] = (),
        end: str | None = END_OF_TEXT,
    ) -> None:
        self.encoding, self.name, self.added = encoding, name, frozenset(added)
        self.n_vocab = encoding.n_vocab
        special = encoding._special_tokens
        self.end_of_text = None if end is None else special.get(end)

    @classmethod
    def from_ranks(
        cls,
        ranks: dict[bytes, int],
        pattern: str = GPT2_PATTERN,
        special_tokens: dict[str, int] | None = None,
        added: Collection[str] = (),
        end: str | None = END_OF_TEXT,
    ) -> BytePairTokenizer:
        """From tiktoken ranks; "<|endoftext|>" gets the lowest free id unless special tokens are given."""
        import tiktoken

        single_bytes = [bytes([b]) for b in range(256)]
        missing = [b for b in single_bytes if b not in ranks]
        if missing:
            raise ValueError(
                f"the ranks lack {len(missing)} of the 256 single bytes, {missing[0]!r} first; not every text could be encoded"
            )
        if special_tokens is None:
            taken = set(ranks.values())
            special_tokens = {END_OF_TEXT: next(i for i in itertools.count() if i not in taken)}
        if not isinstance(special_tokens, dict) or "" in special_tokens:
            raise ValueError(f"special_tokens must map texts to ids, got {special_tokens!r}")
        seen: set[int] = set()
        for token, i in itertools.chain(ranks.items(), special_tokens.items()):
            # Ids may have gaps (OpenAI's p50k and cl100k have), but not so wide that they ask for a terabyte of embeddings.
            if type(i) is not int or not 0 <= i < MAX_SIZES["vocab_size"] or i in seen:
                raise ValueError(
                    f"ids must be whole numbers under {MAX_SIZES['vocab_size']:,}, each once; {token!r} has {i!r}"
                )
            seen.add(i)
        encoding = tiktoken.Encoding("fastgpt", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        return cls(encoding, added=added, end=end)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        special = self.encoding._special_tokens
        self._check_special(allowed_special, special)
        ids: list[int] = []
        for part in _parted(text, self.added.union(allowed_special)):
            if part in special and (part in self.added or part in allowed_special):
                ids.append(special[part])
                continue
            for piece in _pieces(part):
                try:
                    ids += self.encoding.encode_ordinary(piece)
                except BaseException as error:
                    if type(error).__name__ != "PanicException":  # Rust's panics: no Exception, of no importable type
                        raise
                    raise ValueError(
                        f"tiktoken can't encode a piece of {len(piece):,} characters without a line break between two words: "
                        f"{error}"
                    ) from None
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = []
        for token in ids:
            try:
                pieces.append(self.encoding.decode_single_token_bytes(token))
            except (KeyError, OverflowError):
                raise self._outside(token) from None
        return b"".join(pieces)

    def save(self, directory: str | os.PathLike[str]) -> None:
        directory, special = Path(directory), self.encoding._special_tokens
        end = next((text for text, i in special.items() if i == self.end_of_text), None)
        settings: dict[str, Any] = {"kind": "gpt2"}
        if self.name != "gpt2":
            ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
            lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
            write_text(directory / RANKS, "".join(lines))
            settings = {"kind": "tiktoken", "pattern": self.encoding._pat_str, "special_tokens": special}
            settings |= {"added": sorted(self.added), "end": end} if self.added or end != END_OF_TEXT else {}
        write_text(directory / FILE, json.dumps(settings, indent=2) + "\n")
        added = {text: i for text, i in special.items() if text in self.added}
        asked_for = {text: i for text, i in special.items() if text not in self.added}
        pairs = BytePairs(self.encoding._mergeable_ranks, self.encoding._pat_str, asked_for, added, end)
        _write_for_transformers(directory, formats.byte_pairs_json(pairs), end)


class SymbolTokenizer(Tokenizer):
    """One id a character ("char"), or one a word, number, space run or punctuation mark ("word"), for small experiments.

    Args:
        kind: "char" or "word".
        symbols: the vocabulary, in order. Text with a symbol outside it is a ValueError that names the symbol.
    """

    _WORD = re.compile(r"\w+|\s+|[^\w\s]")

    def __init__(self, kind: str, symbols: list[str]) -> None:
        if kind not in ("char", "word"):
            raise ValueError(f"kind must be 'char' or 'word', got {kind!r}")
        if not isinstance(symbols, list) or not all(isinstance(symbol, str) and symbol for symbol in symbols):
            raise ValueError(f"symbols must be a list of texts, got {repr(symbols)[:100]}")
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError(
                f"symbols must be at least one, each once; got {len(symbols)}, {len(set(symbols))} of them different"
            )
        self.kind, self.symbols = kind, symbols
        self._ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.n_vocab, self.end_of_text = len(symbols), None

    @classmethod
    def from_text(cls, kind: str, text: str) -> SymbolTokenizer:
        """The vocabulary of all symbols in `text`, sorted."""
        return cls(kind, sorted(set(cls._split(kind, text))))

    @classmethod
    def _split(cls, kind: str, text: str) -> list[str]:
        return list(text) if kind == "char" else cls._WORD.findall(text)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        self._check_special(allowed_special, ())
        try:
            return [self._ids[symbol] for symbol in self._split(self.kind, text)]
        except KeyError as error:
            raise ValueError(
                f"{error.args[0]!r} is not among the {self.n_vocab} symbols of this {self.kind} tokenizer"
            ) from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        pieces = []
        for token in ids:
            if not 0 <= token < self.n_vocab:
                raise self._outside(token)
            pieces.append(self.symbols[token])
        return "".join(pieces).encode("utf-8", errors="replace")

    def save(self, directory: str | os.PathLike[str]) -> None:
        settings = {"kind": self.kind, "symbols": self.symbols}
        write_text(Path(directory) / FILE, json.dumps(settings, ensure_ascii=True) + "\n")
        _write_for_transformers(Path(directory), formats.symbols_json(self.kind, self.symbols), None)


def _write_for_transformers(directory: Path, tokenizer: dict[str, Any], end: str | None) -> None:
    write_text(directory / formats.TOKENIZER_JSON, json.dumps(tokenizer, ensure_ascii=True) + "\n")
    write_text(directory / formats.CONFIG_JSON, json.dumps(formats.tokenizer_config(end), indent=2) + "\n")


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name, file or directory.

    Args:
        source: "gpt2"; "bundled"; a `.tiktoken` rank file (GPT-2's pattern, "<|endoftext|>" as the last id); a
            `fastgpt_tokenizer.json`; or the directory of a model, of prepared tokens or of nanoGPT's data, with the first of
            `fastgpt_tokenizer.json`, `tokenizer.json`, `vocab.json` with `merges.txt`, and nanoGPT's `meta.pkl`. A directory with
            none of them has GPT-2's where its config.json has GPT-2's vocabulary.

    Raises:
        FileNotFoundError: there is no such file, or the directory says nothing of a tokenizer.
        ValueError: names the file that is there and can't be read, and why.
    """
    if str(source) == "gpt2":
        return _gpt2()
    path = BUNDLED if str(source) == "bundled" else Path(source)
    if path.is_dir():
        if not (path / FILE).is_file():
            return _of_directory(path)
        path = path / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f'no tokenizer at {str(source)!r}; expected "gpt2", "bundled", a .tiktoken file, a {FILE} or a directory'
        )
    ranks = read_ranks(path) if path.suffix == ".tiktoken" else None
    try:
        if ranks is not None:
            return BytePairTokenizer.from_ranks(ranks)
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
        kind = settings["kind"]
        if kind in ("char", "word"):
            return SymbolTokenizer(kind, settings["symbols"])
        if kind == "tiktoken":
            ranks = read_ranks(path.parent / RANKS)
            outside = settings.get("added", ()), settings.get("end", END_OF_TEXT)
            return BytePairTokenizer.from_ranks(ranks, settings["pattern"], settings["special_tokens"], *outside)
        if kind != "gpt2":
            raise ValueError(f"kind must be 'gpt2', 'tiktoken', 'char' or 'word', got {kind!r}")
    except KeyError as error:
        raise ValueError(f"{path} is not a tokenizer file: it lacks {error.args[0]!r}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error
    return _gpt2()


# Vocabularies of GPT-2 as it is, and padded to a multiple of 64 as nanoGPT keeps it.
_GPT2_SIZES = (50257, 50304)


def _of_directory(directory: Path) -> Tokenizer:
    """Another program's tokenizer, or GPT-2's where nothing says otherwise."""
    names = {path.name for path in directory.iterdir()}
    if formats.TOKENIZER_JSON in names or {formats.VOCAB, formats.MERGES} <= names:
        ranks, pattern, special, added, end = formats.read_byte_pairs(directory)
        return BytePairTokenizer.from_ranks(ranks, pattern, special | added, added, end or END_OF_TEXT)
    if formats.META in names:
        return SymbolTokenizer("char", formats.read_meta(directory / formats.META))
    unread = sorted(names & {*formats.UNREAD, formats.VOCAB, formats.MERGES})
    if unread:
        raise ValueError(
            f"{directory / unread[0]} is a tokenizer of a kind that can't be read here; pass a tokenizer of its own"
        )
    known = f"{FILE}, {formats.TOKENIZER_JSON}, {formats.VOCAB} with {formats.MERGES}, or {formats.META}"
    size = None
    if "config.json" in names:
        config = formats.read_object(directory / "config.json")
        size = config.get("vocab_size") or (config.get("fastgpt") or {}).get("vocab_size")
    if size is None or size in _GPT2_SIZES:
        return _gpt2()
    raise FileNotFoundError(
        f"{directory} has no tokenizer ({known}), and its model's vocabulary of {size:,} is not GPT-2's {_GPT2_SIZES[0]:,}"
    )


def read_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """The ranks of a tiktoken file. ValueError names the line that is none, or that has a token or rank a second time."""
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line:  # tiktoken skips them too
            continue
        try:
            code, digits = line.split()
            token, rank = base64.b64decode(code, validate=True), int(digits)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a base64 token and its rank, got {line[:60]!r}"
            ) from error
        if token in ranks or rank in seen:
            raise ValueError(f"{path}, line {number}: the token {token!r} or its rank {rank} came before")
        ranks[token] = rank
        seen.add(rank)
    return ranks


def train_byte_pairs(texts: Iterable[str], vocab_size: int, pattern: str = GPT2_PATTERN) -> BytePairTokenizer:
    """Learn a byte-level BPE with Hugging Face's `tokenizers` (extra `hf`).

    It has `vocab_size` ids, "<|endoftext|>" the last; fewer if the texts have fewer different pairs to merge.
    """
    import importlib.util

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError("training a tokenizer needs the package tokenizers: pip install 'fastgpt-triton[hf]'")
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HubTokenizer

    learner = HubTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    byte_of = formats.byte_of_character()
    by_id = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return BytePairTokenizer.from_ranks({bytes(byte_of[c] for c in token): rank for token, rank in by_id}, pattern)


def _gpt2() -> BytePairTokenizer:
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, urllib3, ssl and OS errors, by what exactly is in the way
        cache = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise ValueError(
            "the GPT-2 vocabulary is not on this machine and could not be fetched "
            f"({type(error).__name__}: {str(error)[:200]}). Set TIKTOKEN_CACHE_DIR to a directory that already holds it "
            f"(now {cache!r}), or go online once; the bundled model needs neither."
        ) from error
    return BytePairTokenizer(encoding, name="gpt2")


def _parted(text: str, tokens: Collection[str]) -> list[str]:
    """`text` cut around each of `tokens` in it; of two that begin at one place, the longer is taken."""
    if not tokens:
        return [text]
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return [part for part in re.split(f"({pattern})", text) if part]


def _pieces(text: str) -> Iterable[str]:
    """Cuts of a long text at line ends, so that no piece is much over PIECE_CHARACTERS (a single longer line stays whole).

    A cut comes after a line end between two visible characters, which is a token of its own in GPT-2's pattern. Among other
    white space it isn't: of "\\n\\nx" the pattern takes "\\n" and "\\n", of "\\n\\n" at the end of a text both at once.
    """
    if len(text) <= PIECE_CHARACTERS:
        yield text
        return
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARACTERS)
        while end != -1 and (text[end - 1].isspace() or text[end + 1 : end + 2].isspace()):
            end = text.find("\n", end + 1)
        end = len(text) if end == -1 else end + 1
        yield text[start:end]
        start = end

"""Other programs' tokenizer files: transformers' tokenizer.json, GPT-2's vocab.json with merges.txt, nanoGPT's meta.pkl.

A byte-level BPE becomes tiktoken's ranks where tiktoken merges as the file says, which is checked merge by merge: tiktoken joins
the two neighbours whose joint token has the lowest id, `tokenizers` the two that stand first in a list. They agree where ids
follow the list, and where each token, encoded by the tokens before it alone, ends as the two halves that the list has for it.
Whatever is asked of a tokenizer.json that these can't do is refused by name.

Sources: https://github.com/huggingface/tokenizers (models/bpe), https://github.com/openai/gpt-2/blob/master/src/encoder.py,
https://github.com/karpathy/nanoGPT/blob/master/data/shakespeare_char/prepare.py.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# How GPT-2 cuts text before merging.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# SHA-256 of GPT-2's merges, a pair a line: the ones that most files have need no second look.
GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"

TOKENIZER_JSON, CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES, META = "vocab.json", "merges.txt", "meta.pkl"
# Tokenizers of kinds that nothing here reads; a directory with one of these is not a GPT-2 without a tokenizer.
UNREAD = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json")


class BytePairs(NamedTuple):
    """A byte-level BPE: tiktoken's ranks, the pattern that cuts text first, and what stands outside the merges.

    special: texts that are tokens only where they are asked for; added: texts that are always; both with their ids.
    end: the text that ends a text, None where the file has none.
    """

    ranks: dict[bytes, int]
    pattern: str
    special: dict[str, int]
    added: dict[str, int]
    end: str | None


def read_byte_pairs(directory: Path) -> BytePairs:
    """From tokenizer.json, else vocab.json and merges.txt. ValueError names what in them can't be read, and why."""
    settings = read_object(directory / CONFIG_JSON) if (directory / CONFIG_JSON).is_file() else {}
    end = settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    path = directory / TOKENIZER_JSON
    if path.is_file():
        return _from_tokenizer_json(read_object(path), end, path)
    vocab = _ids(read_object(directory / VOCAB), directory / VOCAB)
    path = directory / MERGES
    lines = path.read_text(encoding="utf-8").removeprefix("\ufeff").splitlines()
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    ranks, others = _ranks(vocab, merges, path)
    extra = (
        _ids(read_object(directory / "added_tokens.json"), path) if (directory / "added_tokens.json").is_file() else {}
    )
    described = {d["content"]: d for d in settings.get("added_tokens_decoder", {}).values()}
    added = {t: i for t, i in extra.items() if t in described and not described[t].get("special")}
    return BytePairs(ranks, GPT2_PATTERN, {t: i for t, i in (others | extra).items() if t not in added}, added, end)


def _from_tokenizer_json(raw: dict[str, Any], end: str | None, path: Path) -> BytePairs:
    def refuse(what: str) -> ValueError:
        return ValueError(
            f"{path} is not one that can be read here: {what}; only byte-level BPE without a normalizer can"
        )

    model = raw.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise refuse(f"its model is {model.get('type')!r}")
    if raw.get("normalizer") is not None:
        raise refuse(f"it has the normalizer {raw['normalizer'].get('type')!r}")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise refuse(f"its model has {name}={model[name]!r}")
    pattern = _pattern(raw.get("pre_tokenizer") or {})
    if pattern is None:
        raise refuse(f"its pre_tokenizer is {json.dumps(raw.get('pre_tokenizer'))[:200]}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks, others = _ranks(_ids(model["vocab"], path), merges, path)
    special, added = dict(others), dict[str, int]()
    for token in raw.get("added_tokens") or []:
        flags = [name for name in ("single_word", "lstrip", "rstrip") if token.get(name)]
        if flags:
            raise refuse(f"its token {token['content']!r} has {' and '.join(flags)}")
        special.pop(token["content"], None)
        (special if token.get("special") else added)[token["content"]] = token["id"]
    return BytePairs(ranks, pattern, special, added, end)


def _pattern(pre: Mapping[str, Any]) -> str | None:
    """Of a pre_tokenizer that cuts by one pattern and then spells bytes; None for any other."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    if len(steps) > 2 or split.get("type") != "Split" or steps[1].get("use_regex", True) or split.get("invert"):
        return None
    return split["pattern"].get("Regex") if split.get("behavior") == "Isolated" else None


def _ranks(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], path: Path
) -> tuple[dict[bytes, int], dict[str, int]]:
    """(tiktoken's ranks, the entries that no merge makes)"""
    byte_of = byte_of_character()

    def spelled(token: str) -> bytes:
        try:
            return bytes(byte_of[c] for c in token)
        except KeyError as error:
            raise ValueError(f"{path} is not byte-level: a merge has the character {error.args[0]!r}") from None

    try:
        ranks = {bytes([byte]): vocab[c] for c, byte in byte_of.items() if c in vocab}
        made = set(byte_of)
        last = -1
        usual = hashlib.sha256("\n".join(map(" ".join, merges)).encode()).hexdigest() == GPT2_MERGES
        for left, right in merges:
            token, i = spelled(left + right), vocab[left + right]
            if i <= last or token in ranks:
                raise ValueError(
                    f"{path}: the merge {left} {right} is behind one with a higher id, which tiktoken can't follow"
                )
            ranks[token] = last = i
            made.add(left + right)
            if not usual and halves(token, ranks) != [spelled(left), spelled(right)]:
                raise ValueError(f"{path}: tiktoken would not make {left + right!r} of {left!r} and {right!r}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a merge whose token isn't in the vocabulary: {error}") from error
    return ranks, {token: i for token, i in vocab.items() if token not in made}


def halves(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What merging by the ranks below `token`'s own leaves of it: two pieces, where `token` can be made at all."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        best, at = ranks[token], -1
        for i in range(len(pieces) - 1):
            rank = ranks.get(pieces[i] + pieces[i + 1])
            if rank is not None and rank < best:
                best, at = rank, i
        if at < 0:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, reversed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def byte_pairs_json(pairs: BytePairs) -> dict[str, Any]:
    """A tokenizer.json with the same ids for every text."""
    character = {byte: c for c, byte in byte_of_character().items()}
    spelled = {token: "".join(character[byte] for byte in token) for token in pairs.ranks}
    merges = []
    for token in sorted(pairs.ranks, key=pairs.ranks.__getitem__):
        two = halves(token, pairs.ranks) if len(token) > 1 else []
        if len(two) == 2:  # a token that no merge makes is met as a whole word alone, by tiktoken too
            merges.append([spelled[two[0]], spelled[two[1]]])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pairs.pattern}, "behavior": "Isolated", "invert": False}
    cut = {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
    outside = [(text, i, text in pairs.special) for text, i in (pairs.special | pairs.added).items()]
    return _tokenizer_json(
        outside,
        level if pairs.pattern == GPT2_PATTERN else cut,
        level,
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelled[token]: i for token, i in pairs.ranks.items()},
            "merges": merges,
        },
    )


def symbols_json(kind: str, symbols: Sequence[str]) -> dict[str, Any]:
    """A tokenizer.json of characters or words. A symbol outside the vocabulary is an error there as well."""
    # Python's \w and \s, which `tokenizers` has other ideas of.
    pattern = r"[\s\S]" if kind == "char" else r"[\p{L}\p{N}_]+|[\s\x1c-\x1f]+|[^\p{L}\p{N}_\s\x1c-\x1f]"
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {symbol: i for i, symbol in enumerate(symbols)}, "unk_token": ""}
    return _tokenizer_json([], cut, {"type": "Fuse"}, model)


def _tokenizer_json(
    outside: Iterable[tuple[str, int, bool]], cut: dict[str, Any], join: dict[str, Any], model: dict[str, Any]
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": text, **flags, "special": special} for text, i, special in sorted(outside, key=_by_id)
    ]
    settings = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return {**settings, "pre_tokenizer": cut, "post_processor": None, "decoder": join, "model": model}


def _by_id(token: tuple[str, int, bool]) -> int:
    return token[1]


def tokenizer_config(end: str | None) -> dict[str, Any]:
    """A tokenizer_config.json, by which AutoTokenizer takes tokenizer.json as it is."""
    ends = {} if end is None else {"bos_token": end, "eos_token": end, "unk_token": end}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends}


def read_meta(path: Path) -> list[str]:
    """The characters of nanoGPT's meta.pkl, by id. A pickle that holds more than dicts, lists, texts and numbers is refused."""
    try:
        with open(path, "rb") as file:
            meta = _Plain(file).load()
        symbols = meta["itos"]
        return [symbols[i] for i in range(len(symbols))]
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not nanoGPT's: itos, a dict from ids to characters, was expected: {error!r}"
        ) from error


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and nothing in it is to be executed")


def read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _ids(raw: Any, path: Path) -> dict[str, int]:
    if not isinstance(raw, dict) or not all(type(i) is int for i in raw.values()):
        raise ValueError(f"{path} must hold token ids by their texts")
    return raw

"""Checkpoints: to transformers and back, every layout that loads, and every file that must not."""

from __future__ import annotations

import importlib.util
import itertools
import json
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from models import TINY, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from fastgpt import GPTConfig, GPTModel
from fastgpt.checkpoints import weights
from fastgpt.checkpoints.weights import CheckpointError, load_pretrained, save_pretrained

IDS = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(7))


def sharp(**changes: Any) -> GPTModel:
    """A tiny model whose logits depend on every weight, with a norm epsilon and square matrices that can't be mistaken."""
    return tiny_model(**{"norm_eps": 0.01, **changes})


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return {name: bits(tensor) for name, tensor in a.items()} == {name: bits(tensor) for name, tensor in b.items()}


def theirs(**changes: Any) -> GPT2LMHeadModel:
    """transformers' GPT-2, its weights far from initial values."""
    settings = {"vocab_size": 101, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0}
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, layer_norm_epsilon=0.01, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint as transformers writes it."""
    directory = tmp_path_factory.mktemp("good")
    theirs().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def good_tensors(good) -> dict[str, Tensor]:
    return load_pretrained(good)[1]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.fixture
def refused(good, good_tensors) -> Callable[..., str]:
    """Loading raises what it should, at no cost in memory, and the process goes on loading good files."""

    def check(source: Path, *messages: str, error: type[Exception] = CheckpointError) -> str:
        before = peak_bytes()
        with pytest.raises(error) as caught:
            GPTModel.from_pretrained(source)
        for message in messages:
            assert message in str(caught.value)
        assert peak_bytes() - before < 300e6
        assert isinstance(caught.value, (ValueError, OSError))
        assert same_bits(load_pretrained(good)[1], good_tensors)
        return str(caught.value)

    return check


VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_weights": True},
    {"qkv_bias": False},
    {"bias": False},
    {"bias": False, "qkv_bias": False, "tie_weights": True},
    {"activation": "gelu"},
    {"activation": "relu"},
    {"vocab_multiple": 64},
    {"vocab_multiple": 64, "tie_weights": True},
    {"drop_rate": 0.3, "emb_drop_rate": 0.2, "attn_drop_rate": 0.1},
]
OWN: list[dict[str, Any]] = [{"norm_position": "post"}, {"head_bias": True}, {"causal": False}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_transformers_computes_the_same_from_our_files(changes, tmp_path):
    ours = sharp(**changes)
    ours.save_pretrained(tmp_path)
    model, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, ours(IDS), rtol=1e-5, atol=2e-5)
    config = ours.config
    dropouts = (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop)
    assert dropouts == tuple(
        config.drop_rate if p is None else p for p in (config.drop_rate, config.emb_drop_rate, config.attn_drop_rate)
    )


@pytest.mark.parametrize("changes", VARIANTS + OWN, ids=str)
def test_our_files_come_back_bit_for_bit(changes, tmp_path):
    ours = sharp(**changes)
    ours.save_pretrained(tmp_path)
    loaded = GPTModel.from_pretrained(tmp_path)
    assert loaded.config == ours.config
    expected = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for name in ("tok_emb.weight", "out_head.weight", "out_head.bias"):
        if name in expected:
            expected[name][101:] = 0.0
    assert same_bits(loaded.state_dict(), expected)
    assert (loaded.out_head.weight is loaded.tok_emb.weight) == ours.config.tie_weights
    assert torch.equal(loaded(IDS), ours(IDS))
    assert not loaded.training


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"n_inner": 128},
        {"resid_pdrop": 0.25, "embd_pdrop": 0.5, "attn_pdrop": 0.0},
    ],
    ids=str,
)
def test_we_compute_the_same_from_transformers_files(changes, tmp_path):
    reference = theirs(**changes)
    reference.save_pretrained(tmp_path)
    ours = GPTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), reference(IDS).logits, rtol=1e-5, atol=2e-5)
    config, settings = ours.config, reference.config
    assert config.drop_rate == settings.resid_pdrop
    assert (config.emb_drop_rate, config.attn_drop_rate) == (settings.embd_pdrop, settings.attn_pdrop)
    assert config.tie_weights == settings.tie_word_embeddings


def test_a_round_trip_through_transformers_changes_no_bit(tmp_path):
    ours = sharp()
    ours.save_pretrained(tmp_path / "a")
    GPT2LMHeadModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    loaded = GPTModel.from_pretrained(tmp_path / "b")
    assert same_bits(loaded.state_dict(), ours.state_dict())
    assert loaded.config == ours.config


def test_each_weight_is_where_the_conversion_table_says(tmp_path):
    """The table of https://github.com/rasbt/LLMs-from-scratch, ch05, written out for the block 1 that has no symmetry."""
    ours = sharp()
    ours.save_pretrained(tmp_path)
    state, (file, _) = ours.state_dict(), read(tmp_path)
    block = "trf_blocks.1.att."
    packed = [state[f"{block}W_{part}.weight"].T for part in ("query", "key", "value")]
    assert torch.equal(file["transformer.h.1.attn.c_attn.weight"], torch.cat(packed, dim=1))
    packed = [state[f"{block}W_{part}.bias"] for part in ("query", "key", "value")]
    assert torch.equal(file["transformer.h.1.attn.c_attn.bias"], torch.cat(packed))
    square = file["transformer.h.1.attn.c_proj.weight"]
    assert torch.equal(square, state[f"{block}out_proj.weight"].T)
    assert not torch.equal(square, square.T)
    assert torch.equal(file["transformer.h.1.mlp.c_fc.weight"], state["trf_blocks.1.ff.layers.0.weight"].T)
    assert torch.equal(file["transformer.h.1.ln_2.bias"], state["trf_blocks.1.norm2.shift"])
    assert torch.equal(file["transformer.ln_f.weight"], state["final_norm.scale"])
    assert torch.equal(file["lm_head.weight"], state["out_head.weight"])
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_shards_that_transformers_wrote(tmp_path):
    reference = theirs()
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(GPTModel.from_pretrained(tmp_path)(IDS), reference(IDS).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_keys_with_and_without_prefix_and_old_mask_buffers(prefix, tmp_path):
    reference = theirs()
    bare = GPT2Model(reference.config)
    bare.load_state_dict(reference.transformer.state_dict())
    (bare if prefix == "" else reference).save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    assert f"{prefix}wte.weight" in tensors
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    ours = GPTModel.from_pretrained(write(tmp_path, tensors, config))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), reference(IDS).logits, rtol=1e-5, atol=2e-5)


def test_a_tied_head_may_be_in_the_file(tmp_path, good):
    tensors, config = read(good)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    loaded = GPTModel.from_pretrained(write(tmp_path, tensors, config))
    assert loaded.out_head.weight is loaded.tok_emb.weight
    assert same_bits(loaded.state_dict(), GPTModel.from_pretrained(good).state_dict())


def test_the_books_own_names_and_masks_load(tmp_path):
    ours = sharp(qkv_bias=False)
    masks = {f"trf_blocks.{i}.att.mask": torch.triu(torch.ones(16, 16), diagonal=1) for i in range(2)}
    write(tmp_path, ours.state_dict() | masks, {"model_type": "fastgpt", "fastgpt": ours.config.to_dict()})
    assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("changes", OWN, ids=str)
def test_what_gpt2_cannot_say_is_saved_under_our_own_names(changes, tmp_path):
    ours = sharp(activation="relu", **changes)
    ours.save_pretrained(tmp_path)
    file, config = read(tmp_path)
    assert same_bits(file, ours.state_dict())
    assert config["model_type"] == "fastgpt"
    with pytest.raises(ValueError, match="fastgpt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_file_alone_says_what_it_is(tmp_path, good):
    ours = sharp(activation="relu", tie_weights=True)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    loaded = GPTModel.from_pretrained(tmp_path / "model.safetensors")
    assert loaded.config == ours.config
    assert same_bits(loaded.state_dict(), ours.state_dict())
    assert GPTModel.from_pretrained(good / "model.safetensors").config.tie_weights


def test_a_bare_gpt2_file_tells_its_sizes(tmp_path):
    config = GPT2Config(vocab_size=101, n_positions=16, n_embd=128, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(5)
    reference = GPT2LMHeadModel(config).eval()
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    ours = GPTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), reference(IDS).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_a_file_is_what_was_asked(dtype, tmp_path):
    ours = sharp()
    ours.save_pretrained(tmp_path, dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in ours.state_dict().items()}
    assert same_bits(load_pretrained(tmp_path)[1], expected)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loaded = GPTModel.from_pretrained(tmp_path)
    assert same_bits(loaded.state_dict(), {name: tensor.to(wide) for name, tensor in expected.items()})
    kept = GPTModel.from_pretrained(tmp_path, dtype=dtype)
    assert same_bits(kept.state_dict(), expected)
    kept.save_pretrained(tmp_path / "again")
    assert same_bits(load_pretrained(tmp_path / "again")[1], expected)


def test_a_dtype_that_would_not_load_is_not_saved(tmp_path):
    ours = sharp()
    with pytest.raises(ValueError, match=r"dtype must be one of .*torch\.bfloat16.*, got torch\.int8"):
        ours.save_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"final_norm\.scale has dtype torch\.int64"):
        save_pretrained(ours.config, ours.state_dict() | {"final_norm.scale": torch.ones(32).long()}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_inf_and_minus_zero_are_data(tmp_path):
    ours = sharp(tie_weights=True)
    with torch.no_grad():
        ours.tok_emb.weight[5, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
        ours.trf_blocks[0].att.out_proj.weight.fill_(torch.nan)
    ours.save_pretrained(tmp_path)
    assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), ours.state_dict())
    tensors, config = read(tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    assert same_bits(GPTModel.from_pretrained(write(tmp_path, tensors, config)).state_dict(), ours.state_dict())


def test_weights_of_any_layout_in_memory_are_saved(tmp_path):
    ours = sharp()
    strided = {
        name: torch.stack([tensor, tensor + 1], dim=-1)[..., 0].requires_grad_()
        for name, tensor in ours.state_dict().items()
    }
    save_pretrained(ours.config, strided, tmp_path)
    assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_padding_rows_are_left_out_and_come_back_as_zeros(tmp_path):
    ours = sharp(vocab_multiple=64, head_bias=True)
    assert ours.tok_emb.weight[101:].any()
    ours.save_pretrained(tmp_path)
    file, config = read(tmp_path)
    assert torch.equal(file["tok_emb.weight"], ours.tok_emb.weight[:101])
    assert torch.equal(file["out_head.bias"], ours.out_head.bias[:101])
    loaded = GPTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.out_head.weight[:101], ours.out_head.weight[:101])
    for padded in (loaded.tok_emb.weight, loaded.out_head.weight, loaded.out_head.bias):
        assert padded.shape[0] == 128
        assert not padded[101:].any()
    config["fastgpt"]["vocab_multiple"] = 1
    plain = GPTModel.from_pretrained(write(tmp_path, file, config))
    assert torch.equal(plain(IDS), loaded(IDS))


def test_overwriting_the_file_leaves_a_loaded_model_alone(tmp_path):
    ours = sharp()
    ours.save_pretrained(tmp_path)
    loaded = GPTModel.from_pretrained(tmp_path)
    _, tensors = load_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with open(path, "rb+") as file:  # in place, under any map of it
        file.write(b"\xaa" * size)
    assert same_bits(loaded.state_dict(), ours.state_dict())
    assert same_bits(tensors, ours.state_dict())


def test_saving_over_the_file_that_a_model_came_from(tmp_path):
    sharp().save_pretrained(tmp_path)
    loaded = GPTModel.from_pretrained(tmp_path)
    with torch.no_grad():
        loaded.final_norm.scale.mul_(2.0)
    loaded.save_pretrained(tmp_path)
    assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), loaded.state_dict())


def test_a_full_disk_leaves_the_old_checkpoint_and_no_temporary(tmp_path):
    ours = sharp()
    ours.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"config.json", "model.safetensors"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Exception, match=r"(?i)too large|I/O|i/o"):
            sharp(seed=1).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    sharp(seed=1).save_pretrained(tmp_path)
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(IDS), sharp(seed=1)(IDS))


def test_files_are_as_readable_as_any_other(tmp_path):
    sharp().save_pretrained(tmp_path)
    (tmp_path / "plain").write_text("x")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_state_dicts_that_would_lose_something_are_refused_with_every_reason(tmp_path):
    ours = sharp()
    state = dict(ours.state_dict())
    state["trf_blocks.0.att.W_query.lora_A"] = torch.ones(2, 32)
    state["trf_blocks.0.att.out_proj.weight"] = torch.ones(64, 32)
    state["final_norm.shift"] = torch.tensor(0.0)
    del state["trf_blocks.1.norm2.scale"]
    with pytest.raises(ValueError, match="in 4 places") as caught:
        save_pretrained(ours.config, state, tmp_path)
    for message in (
        "trf_blocks.0.att.W_query.lora_A has no place",
        "trf_blocks.0.att.out_proj.weight is [64, 32], not [32, 32]",
        "final_norm.shift is [], not [32]",
        "trf_blocks.1.norm2.scale is missing",
    ):
        assert message in str(caught.value)
    tied = sharp(tie_weights=True)
    with pytest.raises(ValueError, match=r"out_head\.weight differs from tok_emb\.weight"):
        save_pretrained(tied.config, tied.state_dict() | {"out_head.weight": torch.ones(101, 32)}, tmp_path)
    assert not list(tmp_path.iterdir())


# Files that are no safetensors


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\x00" * 8,
        b"\xff" * 64,
        b"garbage that is text " * 50,
        (10**12).to_bytes(8, "little") + b"{}",
        (100_000_001).to_bytes(8, "little") + b"{" * 100,
        (50).to_bytes(8, "little") + b"{" * 50,
        header({"wte.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"\x00" * 4),
        header({"wte.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 9),
        header({"wte.weight": {"dtype": "X32", "shape": [1], "data_offsets": [0, 4]}}, b"\x00" * 4),
        pickle.dumps({"wte.weight": [0.0] * 100}),
    ],
    ids=range(14),
)
def test_files_that_are_no_safetensors_are_refused(content, tmp_path, good, refused):
    shutil.copy(good / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, str(tmp_path / "model.safetensors"), "not a whole safetensors file")
    refused(tmp_path / "model.safetensors", "not a whole safetensors file")


def test_a_file_cut_anywhere_is_refused(tmp_path, good, refused):
    shutil.copy(good / "config.json", tmp_path)
    whole = (good / "model.safetensors").read_bytes()
    for size in (1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        refused(tmp_path, "not a whole safetensors file")
    (tmp_path / "model.safetensors").write_bytes(whole + b"\x00")
    refused(tmp_path, "not a whole safetensors file")


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "ckpt.pt"])
def test_pickles_are_not_opened_unasked(name, tmp_path, good, refused):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    shutil.copy(good / "config.json", tmp_path)
    refused(path, name, "a pickle, which is opened only with allow_pickle=True")
    refused(tmp_path)
    shutil.copy(path, tmp_path / "model.safetensors")
    refused(tmp_path, "not a whole safetensors file")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_pretrained(tmp_path, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_a_directory_of_nothing_says_what_was_looked_for(tmp_path, refused):
    refused(tmp_path, "no model.safetensors, nor any of", "pytorch_model.bin", "ckpt.pt", "model.ckpt.index")


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'"text"', "must hold a JSON object, got str"),
        (b'{"a": "' + b"x" * 2**20 + b'"}', "has 1,048,585 bytes; at most 1,048,576 are read"),
    ],
    ids=range(9),
)
def test_a_config_that_is_no_object_is_refused(content, message, tmp_path, good, refused):
    shutil.copy(good / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, str(tmp_path / "config.json"), message)


HUGE = 10**400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"n_positions": None}, "lacks 'n_positions'"),
        ({"n_embd": None}, "lacks 'n_embd'"),
        ({"n_layer": None}, "lacks 'n_layer'"),
        ({"n_head": None}, "lacks 'n_head'"),
        ({"vocab_size": "101"}, "vocab_size must be int, got '101' (str)"),
        ({"n_layer": 2.0}, "n_layers must be int, got 2.0 (float)"),
        ({"n_layer": True}, "n_layers must be int, got True (bool)"),
        ({"n_head": [4]}, "n_heads must be int, got [4] (list)"),
        ({"n_embd": {}}, "emb_dim must be int, got {} (dict)"),
        ({"n_embd": [32]}, "emb_dim must be int, got [32] (list)"),
        ({"resid_pdrop": "no"}, "drop_rate must be float, got 'no' (str)"),
        ({"resid_pdrop": float("nan")}, "drop_rate must be from 0 to 1, got nan"),
        ({"attn_pdrop": 1.5}, "attn_drop_rate must be from 0 to 1, got 1.5"),
        ({"layer_norm_epsilon": 0}, "norm_eps must be a positive number, got 0"),
        ({"layer_norm_epsilon": float("inf")}, "norm_eps must be a positive number, got inf"),
        ({"layer_norm_epsilon": HUGE}, "config.json: "),
        ({"resid_pdrop": HUGE}, "drop_rate must be from 0 to 1"),
        ({"tie_word_embeddings": 1}, "tie_weights must be bool, got 1 (int)"),
        ({"n_layer": 0}, "n_layers must be from 1 to 1,024, got 0"),
        ({"n_layer": -2}, "n_layers must be from 1 to 1,024, got -2"),
        ({"n_layer": 10**9}, "n_layers must be from 1 to 1,024, got 1,000,000,000"),
        ({"vocab_size": 2**40}, "vocab_size must be from 1 to 2,097,152"),
        ({"n_positions": 2**40}, "context_length must be from 1 to 1,048,576"),
        ({"n_embd": 2**40}, "emb_dim must be from 1 to 65,536"),
        ({"n_embd": HUGE}, "emb_dim must be from 1 to 65,536"),
        ({"n_head": 5}, "emb_dim must be divisible by n_heads, got emb_dim=32 and n_heads=5"),
        ({"model_type": "llama"}, "model_type 'llama'; only 'gpt2' and 'fastgpt' load"),
        ({"model_type": ["gpt2"]}, "model_type ['gpt2']"),
        ({"model_type": "fastgpt"}, "lacks 'fastgpt'"),
        ({"activation_function": "swish"}, "activation_function='swish'; known are ['gelu', 'gelu_new',"),
        ({"activation_function": ["gelu"]}, "activation_function=['gelu']; known are"),
        ({"n_inner": 64}, "n_inner=64; only four times n_embd loads"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"fastgpt": 3}, '"fastgpt" in config.json must be an object, got 3'),
        ({"fastgpt": []}, '"fastgpt" in config.json must be an object, got []'),
        ({"fastgpt": {}}, "config lacks ['vocab_size', 'context_length', 'emb_dim', 'n_heads', 'n_layers',"),
        ({"fastgpt": tiny_config().to_dict() | {"rope": 1}}, "config has unknown keys ['rope']"),
        ({"fastgpt": tiny_config().to_dict() | {"n_layers": "2"}}, "n_layers must be int, got '2' (str)"),
        ({"fastgpt": tiny_config().to_dict() | {"vocab_multiple": 2**30}}, "vocab_multiple must be from 1 to 4,096"),
    ],
    ids=str,
)
def test_bad_configs_are_refused_by_name(changes, message, tmp_path, good, refused):
    tensors, config = read(good)
    config |= changes
    for name in [name for name in changes if changes[name] is None]:
        del config[name]
    said = refused(write(tmp_path, tensors, config), message)
    assert len(said) < 1500


def test_a_config_that_asks_for_terabytes_allocates_nothing(tmp_path, good, refused):
    tensors, config = read(good)
    config |= {"n_embd": 2**16, "n_layer": 2**10, "vocab_size": 2**21, "n_positions": 2**20, "n_head": 2**10}
    refused(
        write(tmp_path, tensors, config),
        "transformer.wte.weight is [101, 32], the config says [2097152, 65536]",
        "missing transformer.h.1023.mlp.c_proj.bias [65536]",
    )


def test_a_config_that_contradicts_its_own_fastgpt_is_refused(tmp_path, refused):
    sharp().save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    changed = config | {"activation_function": "relu", "layer_norm_epsilon": 0.5, "n_head": 8}
    refused(
        write(tmp_path, tensors, changed),
        'contradicts its own "fastgpt"',
        "n_head=8 beside 4",
        "activation_function='relu' beside 'gelu_new'",
        "layer_norm_epsilon=0.5 beside 0.01",
    )
    del changed["fastgpt"]
    assert GPTModel.from_pretrained(write(tmp_path, tensors, changed)).config.activation == "relu"


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "3", "{}", '{"vocab_size": 101}'], ids=range(5))
def test_bad_metadata_is_refused(content, tmp_path, good, refused):
    tensors, _ = read(good)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"fastgpt": content})
    refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"wpe.weight": torch.tensor(1.0)},
        {"wte.weight": torch.ones(3)},
        {"wte.weight": torch.ones(101, 0)},
        {"wte.weight": torch.ones(101, 33)},
        {"wte.weight": None},
        {"h.x.ln_1.bias": torch.ones(64), "h.": torch.ones(1)},
    ],
    ids=range(6),
)
def test_bare_files_that_tell_no_sizes_are_refused(changes, tmp_path, refused):
    tensors = {"wte.weight": torch.ones(101, 64), "wpe.weight": torch.ones(16, 64)} | changes
    refused(write(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}))


# Tensors


def test_every_mismatch_is_listed_in_one_error(tmp_path, good, refused):
    tensors, config = read(good)
    del tensors["transformer.h.0.ln_1.weight"], tensors["transformer.ln_f.bias"]
    tensors["transformer.h.2.ln_1.weight"] = torch.ones(32)
    tensors["transformer.extra"] = torch.ones(2, 3)
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"].T
    tensors["transformer.h.0.attn.c_attn.bias"] = torch.ones(32)
    tensors["transformer.wpe.weight"] = torch.ones(16, 32, dtype=torch.int64)
    tensors["transformer.h.1.ln_2.bias"] = torch.ones(32, dtype=torch.bool)
    refused(
        write(tmp_path, tensors, config),
        "doesn't match its config in 8 places",
        "missing transformer.h.0.ln_1.weight [32]",
        "missing transformer.ln_f.bias [32]",
        "unknown transformer.h.2.ln_1.weight [32]",
        "unknown transformer.extra [2, 3]",
        "transformer.h.1.mlp.c_fc.weight is [128, 32], the config says [32, 128]",
        "transformer.h.0.attn.c_attn.bias is [32], the config says [96]",
        "transformer.wpe.weight has dtype I64, expected one of ['F64', 'F32', 'F16', 'BF16']",
        "transformer.h.1.ln_2.bias has dtype BOOL",
    )


def test_our_own_names_are_checked_as_well(tmp_path, refused):
    ours = sharp(norm_position="post")
    ours.save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    del tensors["trf_blocks.1.norm1.scale"]
    tensors["trf_blocks.0.att.W_rotary.weight"] = torch.ones(32, 32)
    tensors["out_head.weight"] = torch.ones(100, 32)
    refused(
        write(tmp_path, tensors, config),
        "in 3 places",
        "missing trf_blocks.1.norm1.scale [32]",
        "unknown trf_blocks.0.att.W_rotary.weight [32, 32]",
        "out_head.weight is [100, 32], the config says [101, 32]",
    )


def test_keys_of_both_kinds_of_prefix_are_a_mismatch(tmp_path, good, refused):
    tensors, config = read(good)
    tensors["h.0.ln_1.bias"] = tensors.pop("transformer.h.0.ln_1.bias")
    refused(write(tmp_path, tensors, config), "missing transformer.h.0.ln_1.bias", "unknown h.0.ln_1.bias")


def test_names_of_nobody_are_said_to_be_so(tmp_path, good, refused):
    refused(write(tmp_path, {}, read(good)[1]), "not those of a GPT-2 that is known here: there are none")
    refused(write(tmp_path, {"model.norm": torch.ones(3)}, read(good)[1]), "is known here: model.norm")


def test_a_file_of_one_tensor_lists_everything_else(tmp_path, good, refused):
    tensors, config = read(good)
    kept = {"transformer.wpe.weight": tensors["transformer.wpe.weight"]}
    said = refused(write(tmp_path, kept, config), "in 27 places", "missing transformer.wte.weight [101, 32]")
    assert said.count("missing") == 27


def test_a_head_that_is_not_the_embedding_of_a_tied_config_is_refused(tmp_path, good, refused):
    tensors, config = read(good)
    head = tensors["transformer.wte.weight"].clone()
    head[100, 31] += 1.0
    refused(write(tmp_path, tensors | {"lm_head.weight": head}, config), "the head differs from the token embedding")
    refused(write(tmp_path, tensors | {"lm_head.weight": head[:5]}, config), "lm_head.weight is [5, 32]")
    config["tie_word_embeddings"] = False
    loaded = GPTModel.from_pretrained(write(tmp_path, tensors | {"lm_head.weight": head}, config))
    assert torch.equal(loaded.out_head.weight, head)


def test_biases_that_were_trained_elsewhere_are_not_dropped(tmp_path, refused):
    sharp(qkv_bias=False, bias=False).save_pretrained(tmp_path / "ours")
    elsewhere = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        elsewhere.transformer.h[1].attn.c_attn.bias[40] = 0.5
        elsewhere.transformer.ln_f.bias[3] = torch.nan
    elsewhere.save_pretrained(tmp_path / "theirs")
    refused(
        tmp_path / "theirs",
        "the config leaves out weights that the checkpoint has",
        "trf_blocks.1.att.W_key.bias isn't zero",
        "final_norm.shift isn't zero",
    )
    tensors, config = read(tmp_path / "theirs")
    del config["fastgpt"]
    tensors["transformer.ln_f.bias"][3] = 0.25
    loaded = GPTModel.from_pretrained(write(tmp_path / "theirs", tensors, config))
    assert loaded.trf_blocks[1].att.W_key.bias.nonzero().tolist() == [[8]]
    assert loaded.final_norm.shift[3] == 0.25


# Shards


def sharded(directory: Path, good: Path, weight_map: Any) -> Path:
    shutil.copy(good / "config.json", directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/outside.safetensors", "sub/inside.safetensors", "", ".", "..", "./x.safetensors"],
)
def test_shards_outside_the_directory_are_refused(name, tmp_path, good, refused):
    name = str(tmp_path / "outside.safetensors") if name.startswith("/") else name
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside", directory / "sub" / "inside", directory / "x"):
        shutil.copy(good / "model.safetensors", place.with_suffix(".safetensors"))
    names = dict.fromkeys(load_file(good / "model.safetensors"), name)
    refused(sharded(directory, good, names), f"names a shard outside its own directory: {name!r}")


@pytest.mark.parametrize(
    "weight_map", [None, [], 3, "model.safetensors", {"wte.weight": 3}, {"wte.weight": None}], ids=str
)
def test_indexes_without_a_map_of_names_are_refused(weight_map, tmp_path, good, refused):
    refused(sharded(tmp_path, good, weight_map), "has no weight_map of file names")


def test_broken_indexes_and_shards_are_refused(tmp_path, good, refused):
    refused(sharded(tmp_path, good, {}), "there are none")
    refused(
        sharded(tmp_path, good, {"a": "model-1.safetensors"}),
        "names the shard 'model-1.safetensors', which isn't there",
    )
    (tmp_path / "model-1.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-1])
    refused(tmp_path, "model-1.safetensors", "not a whole safetensors file")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, "model.safetensors.index.json is not JSON")


def test_a_shard_left_out_is_a_list_of_what_is_missing(tmp_path, refused):
    theirs().save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    lost = [name for name, shard in content["weight_map"].items() if shard == last]
    content["weight_map"] = {name: shard for name, shard in content["weight_map"].items() if shard != last}
    index.write_text(json.dumps(content))
    refused(tmp_path, f"in {len(lost)} places", *(f"missing {name} " for name in lost))


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, {"norm_position": "post"}], ids=str)
def test_shards_that_we_wrote(changes, tmp_path):
    ours = sharp(**changes)
    ours.save_pretrained(tmp_path, max_shard_bytes=20_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 3
    contents = [load_file(tmp_path / shard) for shard in shards]
    sizes = [sum(tensor.nbytes for tensor in content.values()) for content in contents]
    assert all(size <= 20_000 for size in sizes)
    assert all(left + right > 20_000 for left, right in itertools.pairwise(sizes))  # none is needless
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {n: s for s, content in zip(shards, contents, strict=True) for n in content}
    loaded = GPTModel.from_pretrained(tmp_path)
    assert loaded.config == ours.config
    assert same_bits(loaded.state_dict(), ours.state_dict())
    if "norm_position" not in changes:
        with torch.no_grad():
            logits = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(IDS).logits
        torch.testing.assert_close(logits, ours(IDS), rtol=1e-5, atol=2e-5)


def test_a_shard_of_one_large_tensor_and_a_model_that_needs_no_shards(tmp_path):
    ours = sharp()
    save_pretrained(ours.config, ours.state_dict(), tmp_path / "one", max_shard_bytes=1)
    assert len(list((tmp_path / "one").glob("model-*"))) == len(load_file_names(tmp_path / "one"))
    assert same_bits(GPTModel.from_pretrained(tmp_path / "one").state_dict(), ours.state_dict())
    save_pretrained(ours.config, ours.state_dict(), tmp_path / "all", max_shard_bytes=10**9)
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"model.safetensors", "config.json"}
    with pytest.raises(ValueError, match="max_shard_bytes must be at least 1, got 0"):
        save_pretrained(ours.config, ours.state_dict(), tmp_path / "none", max_shard_bytes=0)
    assert not (tmp_path / "none").exists()


def load_file_names(directory: Path) -> list[str]:
    return [name for path in directory.glob("*.safetensors") for name in load_file(path)]


def test_saves_over_one_another_leave_nothing_behind(tmp_path):
    for seed, limit in enumerate([None, 20_000, 50_000, 20_000, None]):
        ours = sharp(seed=seed)
        save_pretrained(ours.config, ours.state_dict(), tmp_path, max_shard_bytes=limit)
        assert same_bits(GPTModel.from_pretrained(tmp_path).state_dict(), ours.state_dict())
        names = load_file_names(tmp_path)
        assert len(names) == len(set(names)) == 29
        assert (tmp_path / "model.safetensors.index.json").exists() == (limit is not None)


def test_a_tensor_in_two_shards_is_refused(tmp_path, good, refused):
    tensors = load_file(good / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] + 1 for name in names[18:]}, tmp_path / "model-2.safetensors")
    weight_map = {name: f"model-{1 + (i >= 20)}.safetensors" for i, name in enumerate(names)}
    said = refused(sharded(tmp_path, good, weight_map), "tensors are in two shards")
    for name in names[18:20]:
        assert f"{name} is in model-1.safetensors and in model-2.safetensors" in said


def test_shards_of_two_saves_are_refused(tmp_path, refused):
    for seed in (0, 1):
        ours = sharp(seed=seed)
        save_pretrained(ours.config, ours.state_dict(), tmp_path / str(seed), max_shard_bytes=40_000)
    shard = "model-00002-of-00004.safetensors"
    assert (tmp_path / "0" / shard).is_file()
    shutil.copy(tmp_path / "1" / shard, tmp_path / "0" / shard)
    refused(tmp_path / "0", "shards of different saves", shard)


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize(
    "changes",
    [{"n_heads": 8}, {"activation": "relu"}, {"norm_eps": 0.5}, {"norm_position": "post"}],
    ids=str,
)
def test_a_save_that_was_interrupted_loads_as_the_old_model_or_not_at_all(
    changes, limit, tmp_path, monkeypatch, refused
):
    """The weights are in place, config.json is still the old one, and both have the same shapes."""
    sharp().save_pretrained(tmp_path)
    new = sharp(seed=1, **changes)

    def interrupted(path: Any, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(new.config, new.state_dict(), tmp_path, max_shard_bytes=limit)
    monkeypatch.undo()
    (name, value), *_ = changes.items()
    old = getattr(sharp().config, name)
    refused(tmp_path, "of different saves", f"{name}={old!r}, the weights {value!r}")


def test_dropout_may_be_edited_in_config_json(tmp_path):
    sharp().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastgpt"] |= {"drop_rate": 0.25, "attn_drop_rate": 0.5, "vocab_multiple": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = GPTModel.from_pretrained(tmp_path)
    assert (loaded.config.drop_rate, loaded.config.attn_drop_rate) == (0.25, 0.5)
    assert torch.equal(loaded(IDS), sharp()(IDS))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix, tmp_path, good, good_tensors):
    tensors, config = read(good)
    write(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()}, config)
    assert same_bits(load_pretrained(tmp_path)[1], good_tensors)


def test_the_books_own_dict_is_a_config(tmp_path):
    ours = sharp(norm_eps=1e-5)
    write(tmp_path, ours.state_dict(), {**TINY, "kv_window_size": 4})
    assert GPTModel.from_pretrained(tmp_path).config == ours.config


# Names


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "~/model", "a/b/c", "/absent/dir", "GPT2"])
def test_names_of_nothing_are_refused(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(name, f"no model at {name!r}; expected a directory, a file", "gpt2-xl", error=FileNotFoundError)


def test_hub_names_go_to_the_hub(monkeypatch, good, good_tensors):
    asked = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same_bits(load_pretrained("gpt2-large", revision="abc")[1], good_tensors)
    assert same_bits(GPTModel.from_pretrained("owner/name").state_dict(), GPTModel.from_pretrained(good).state_dict())
    assert asked == [("openai-community/gpt2-large", "abc"), ("owner/name", None)]


@pytest.mark.parametrize("allowed", [True, False])
def test_pickles_are_fetched_only_where_they_may_be_opened(allowed, monkeypatch, good, good_tensors):
    asked: list[str] = []
    download = lambda repo, revision, allow_patterns: asked.extend(allow_patterns) or str(good)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_bits(load_pretrained("gpt2", allow_pickle=allowed)[1], good_tensors)
    assert any("bin" in pattern for pattern in asked) == allowed


def test_a_hub_out_of_reach_is_named(monkeypatch, refused):
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("gpt2", "'gpt2' is no local path and could not be fetched from the hub: name resolution failed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("gpt2", "needs huggingface_hub: pip install 'fastgpt-triton[hub]'")


def test_a_directory_of_that_name_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ours = sharp()
    ours.save_pretrained("gpt2")
    monkeypatch.setattr(weights, "_download", lambda *args: pytest.fail("went to the hub"))
    assert same_bits(GPTModel.from_pretrained("gpt2").state_dict(), ours.state_dict())


def test_the_config_of_a_checkpoint_is_a_config(good):
    config, tensors = load_pretrained(good)
    assert config == GPTConfig(
        *(101, 16, 32, 4, 2, 0.1, True),
        tie_weights=True,
        init="gpt2",
        norm_eps=0.01,
        emb_drop_rate=0.1,
        attn_drop_rate=0.1,
    )
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weights.expected_shapes(config)

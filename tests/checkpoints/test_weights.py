"""Weights to transformers and back, bit for bit, and what saving does to files."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
import torch
from checkpoint_models import IDS, close, read, same_bits, sharp, theirs, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from fastgpt import GPTModel, quantize
from fastgpt.checkpoints.weights import load_pretrained, save_pretrained

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
        close(model.eval()(IDS).logits, ours(IDS))
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
        close(ours(IDS), reference(IDS).logits)
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
        close(GPTModel.from_pretrained(tmp_path)(IDS), reference(IDS).logits)


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
        close(ours(IDS), reference(IDS).logits)


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
        close(ours(IDS), reference(IDS).logits)


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
    with pytest.raises(ValueError, match=r"dtype must be one of .*torch\.bfloat16.*, got torch\.int16"):
        ours.save_pretrained(tmp_path, dtype=torch.int16)
    for dtype in (torch.int8, torch.int16):  # a quantized model's matrices are integers already; its biases can't be
        with pytest.raises(ValueError, match=rf"dtype must be one of .*, got {dtype}"):
            quantize(ours).save_pretrained(tmp_path, dtype=dtype)
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
    close(plain(IDS), loaded(IDS))  # a product of another shape may be summed in another order


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


def test_dropout_may_be_edited_in_config_json(tmp_path):
    sharp().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fastgpt"] |= {"drop_rate": 0.25, "attn_drop_rate": 0.5, "vocab_multiple": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = GPTModel.from_pretrained(tmp_path)
    assert (loaded.config.drop_rate, loaded.config.attn_drop_rate) == (0.25, 0.5)
    close(loaded(IDS), sharp()(IDS))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix, tmp_path, good, good_tensors):
    tensors, config = read(good)
    write(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()}, config)
    assert same_bits(load_pretrained(tmp_path)[1], good_tensors)


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True, "vocab_multiple": 64}, OWN[1]], ids=str)
def test_matrices_in_8_bits_come_back_as_floats(changes, tmp_path):
    ours = sharp(**changes)
    ours.save_pretrained(tmp_path / "floats")
    ours.save_pretrained(tmp_path / "int8", dtype=torch.int8)
    exact, (config, read_back) = load_pretrained(tmp_path / "floats")[1], load_pretrained(tmp_path / "int8")
    assert config == ours.config
    assert set(read_back) == set(exact)
    for name, tensor in read_back.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, exact[name])
            continue
        steps = exact[name].double().abs().amax(dim=1, keepdim=True) / 127  # rounding moves by half a step at most
        assert ((tensor.double() - exact[name].double()).abs() <= 0.5001 * steps).all(), name
        assert not torch.equal(tensor, exact[name])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        loaded = GPTModel.from_pretrained(tmp_path / "int8", dtype=dtype)
        loaded.save_pretrained(tmp_path / "of that dtype")
        kept = load_pretrained(tmp_path / "of that dtype")[1]
        assert same_bits(kept, {name: tensor.to(dtype) for name, tensor in read_back.items()})
    sizes = [sum(file.stat().st_size for file in (tmp_path / kind).glob("model*")) for kind in ("floats", "int8")]
    assert sizes[1] < 0.5 * sizes[0]  # of a small model, whose header and vectors count

    GPTModel.from_pretrained(tmp_path / "int8").save_pretrained(
        tmp_path / "again", dtype=torch.int8, max_shard_bytes=5000
    )
    assert len(list((tmp_path / "again").glob("model-*"))) > 1
    assert same_bits(load_pretrained(tmp_path / "again")[1], read_back)


def test_a_linear_stored_in_8_bits_is_what_quantize_makes_of_it(tmp_path):
    ours = sharp()
    ours.save_pretrained(tmp_path, dtype=torch.int8)
    rounded = quantize(ours).trf_blocks[1].ff.layers[0]
    stored = GPTModel.from_pretrained(tmp_path).trf_blocks[1].ff.layers[0]
    assert torch.equal(stored.weight, rounded.weight.float() * rounded.scale[:, None])
    assert torch.equal(quantize(GPTModel.from_pretrained(tmp_path)).trf_blocks[1].ff.layers[0].weight, rounded.weight)


def test_8_bits_that_cannot_be_are_refused(tmp_path):
    ours = sharp()
    broken = ours.state_dict() | {"pos_emb.weight": torch.full((16, 32), float("inf"))}
    with pytest.raises(ValueError, match=r"pos_emb\.weight: weights must be finite to be stored as int8, got inf"):
        save_pretrained(ours.config, broken, tmp_path, torch.int8)
    assert not list(tmp_path.iterdir())
    ours.save_pretrained(tmp_path, dtype=torch.int8)
    tensors = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    for scale in (None, torch.ones(16, dtype=torch.float64), torch.ones(15)):
        changed = {name: tensor for name, tensor in tensors.items() if name != "pos_emb.weight.row_scale"}
        changed |= {} if scale is None else {"pos_emb.weight.row_scale": scale}
        save_file(changed, tmp_path / "model.safetensors", metadata)
        with pytest.raises(ValueError, match=r"pos_emb\.weight has dtype I8, expected one of"):
            GPTModel.from_pretrained(tmp_path)

"""Hugging Face's config.json and safetensors: what is read and written, what is refused with which words, and that
transformers computes the same.
"""

import dataclasses
import json
import pickle
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from franca.core.config import config as section
from franca.core.errors import ConfigError
from franca.models import hf
from franca.models.base import IGNORE, Batch
from franca.models.gpt2 import GPT2Config
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig
from franca.parallel.apply import init_weights

SMALL = LlamaConfig(
    vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=16, init_std=0.25
)
GPT2 = GPT2Config(vocab_size=61, dim=32, num_layers=2, num_heads=4, max_seq_len=16, init_std=0.25)
MAMBA = MambaConfig(
    kind="mamba", vocab_size=61, dim=32, num_layers=2, head_dim=8, state_dim=6, num_groups=2, max_seq_len=16, init_std=0.25
)
SCALING = RopeScaling(factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_position_embeddings=12)


def weights(config: Any) -> dict[str, Tensor]:
    model = config.build()
    init_weights(model, torch.Generator().manual_seed(0))
    return {name: p.detach() for name, p in model.named_parameters()}


def scattered(config: Any) -> dict[str, Tensor]:
    """Every number of its own, biases and gains too."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights(config).items()}


def empty(config: Any) -> dict[str, Tensor]:
    return {name: torch.full_like(p, torch.nan) for name, p in config.build().named_parameters()}


def values(config: Any = SMALL, **changes: Any) -> dict[str, Any]:
    return {**hf.to_hf_config(config, {"bos": None, "eos": 0}, torch.float32), **changes}


def write(folder: Path, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, size: int = 10**9) -> None:
    hf.write_tensors(folder, config, tensors, lambda names: {name: tensors[name] for name in names}, dtype, size)


# --- config.json


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 4},
        {"tied": True},
        {"qk_norm": True},
        {"rope_scaling": SCALING},
        {"qk_norm": True, "rope_scaling": SCALING},
        {"head_dim": 16, "rope_theta": 5e5, "norm_eps": 1e-6, "max_seq_len": 99},
        {"window": 5},
        {"window": 5, "tied": True, "rope_scaling": SCALING},
        {"qkv_bias": True},
        {"qkv_bias": True, "window": 5},
        {"qk_norm": True, "window": 5},
    ],
    ids=str,
)
def test_a_config_survives_the_way_there_and_back(options: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **options)
    assert hf.from_hf_config(json.loads(json.dumps(values(config))), "config.json") == config


@pytest.mark.parametrize("options", [{}, {"mlp_dim": 40}, {"tied": False, "norm_eps": 1e-6}, {"dropout": 0.0}], ids=str)
def test_a_gpt2_survives_the_way_there_and_back(options: dict[str, Any]) -> None:
    config = dataclasses.replace(GPT2, **options)
    assert hf.from_hf_config(json.loads(json.dumps(values(config))), "config.json") == config


@pytest.mark.parametrize(
    "options", [{}, {"tied": True, "num_groups": 1}, {"expand": 3, "conv_size": 2, "dt_max": 0.2, "norm_eps": 1e-6}], ids=str
)
def test_a_mamba_survives_the_way_there_and_back(options: dict[str, Any]) -> None:
    config = dataclasses.replace(MAMBA, **options)
    assert hf.from_hf_config(json.loads(json.dumps(values(config))), "config.json") == config


@pytest.mark.parametrize(
    ("config", "kind", "architecture"),
    [
        (SMALL, "llama", "LlamaForCausalLM"),
        (dataclasses.replace(SMALL, window=5), "mistral", "MistralForCausalLM"),
        (dataclasses.replace(SMALL, qkv_bias=True, window=5), "qwen2", "Qwen2ForCausalLM"),
        (dataclasses.replace(SMALL, qk_norm=True), "qwen3", "Qwen3ForCausalLM"),
        (GPT2, "gpt2", "GPT2LMHeadModel"),
        (MAMBA, "mamba2", "Mamba2ForCausalLM"),
    ],
)
def test_a_model_is_exported_as_the_family_that_computes_the_same(config: Any, kind: str, architecture: str) -> None:
    written = values(config)
    assert (written["model_type"], written["architectures"]) == (kind, [architecture])


@section
class MyConfig(LlamaConfig):
    """Below a class of ours, and no Llama any more, for all we know."""

    kind: Literal["my_llama_of_test_hf"] = "my_llama_of_test_hf"  # type: ignore[assignment]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, mlp="relu2"),
        dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True),
        dataclasses.replace(MAMBA, dt_bias=False),
        MyConfig(vocab_size=61),
    ],
    ids=["relu2", "qkv_bias and qk_norm", "no dt_bias", "a user's"],
)
def test_a_model_that_they_do_not_have_takes_its_code_along(config: Any) -> None:
    assert hf.family_of(config) is None
    written = json.loads(json.dumps(values(config)))
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_franca.FrancaForCausalLM"
    assert hf.from_hf_config(written, "config.json") == config


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_is_what_transformers_takes_it_for(kind: str) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 48}
    given = {"model_type": kind, **sizes, "max_position_embeddings": 16, "rms_norm_eps": 1e-6}
    ours, theirs = hf.from_hf_config(given, "config.json"), AutoConfig.for_model(**given)
    head_dim = getattr(theirs, "head_dim", 128 // 32)  # Qwen 2 has none of its own
    assert (ours.num_kv_heads or 32, ours.width_of_head) == (theirs.num_key_value_heads, head_dim)
    assert (ours.init_std, ours.tied) == (theirs.initializer_range, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.window == getattr(theirs, "sliding_window", None)


def test_what_a_gpt2_config_leaves_out_is_what_transformers_takes_it_for() -> None:
    """And its oldest config.json, with keys of other tasks, is read."""
    given = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    given |= {"layer_norm_epsilon": 1e-5, "n_ctx": 16, "summary_type": "cls_index", "task_specific_params": {}}
    ours, theirs = hf.from_hf_config(given, "config.json"), AutoConfig.for_model(**given)
    assert (ours.mlp_dim, ours.tied, ours.init_std) == (theirs.n_inner, theirs.tie_word_embeddings, theirs.initializer_range)
    assert {ours.dropout} == {theirs.resid_pdrop, theirs.embd_pdrop, theirs.attn_pdrop}


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, 5),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 2}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qkv_bias", "qk_norm"])
def test_a_qwen_has_a_window_in_the_layers_that_are_said_to_have_one(
    family: str, changes: dict[str, Any], window: int | None
) -> None:
    given = values(dataclasses.replace(SMALL, **{family: True}), **changes)
    assert hf.from_hf_config(given, "config.json").window == window


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"qkv_bias": True}, {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, ["1 of 2 layers"]),
        ({"qk_norm": True}, {"layer_types": ["sliding_attention", "full_attention"]}, ["1 of 2 layers", "is None"]),
        ({"qk_norm": True}, {"attention_bias": True}, ["attention_bias"]),
        ({"window": 5}, {"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ({"window": 5}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["rope_type", "dynamic"]),
        ({"window": 5}, {"rope_parameters": [1e4]}, ["another type"]),
        ({"window": 5}, {"sliding_window": "wide"}, ["window"]),
    ],
    ids=str,
)
def test_what_no_model_of_ours_computes_is_refused(options: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.from_hf_config(values(dataclasses.replace(SMALL, **options), **changes), "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "relu"}, ["activation_function", "relu", "gelu_new"]),
        ({"activation_function": "gelu"}, ["'gelu'; only 'gelu_new'"]),
        ({"attn_pdrop": 0.0}, ["resid_pdrop 0.1", "attn_pdrop 0.0"]),
        ({"scale_attn_weights": False}, ["scale_attn_weights"]),
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"n_head": 5}, ["dim 32 does not divide into 5 heads"]),
    ],
    ids=str,
)
def test_a_gpt2_that_ours_is_not_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.from_hf_config(values(GPT2, **changes), "there/config.json")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, ["num_heads * head_dim is 40, expand * hidden_size is 64"]),
        ({"time_step_limit": [0.0, 0.1]}, ["time_step_limit is [0.0, 0.1]"]),
        ({"time_step_limit": [{"__float__": "-Infinity"}, 0.1]}, ["time_step_limit"]),
        ({"time_step_limit": 3}, ["another type"]),
        ({"use_bias": True}, ["use_bias is True"]),
        ({"use_conv_bias": False}, ["use_conv_bias is False"]),
        ({"rms_norm": False}, ["rms_norm is False"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        ({"n_groups": 3}, ["3 does not divide 8 heads"]),
    ],
    ids=str,
)
def test_a_mamba_that_ours_is_not_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.from_hf_config(values(MAMBA, **changes), "there/config.json")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "limit", [[0.0, float("inf")], [0, {"__float__": "Infinity"}]], ids=["JSON's way", "transformers' way"]
)
def test_steps_of_time_without_limits_are_read_however_infinity_is_written(limit: list[Any]) -> None:
    assert hf.from_hf_config(json.loads(json.dumps(values(MAMBA, time_step_limit=limit))), "config.json") == MAMBA


def test_what_a_mamba_config_leaves_out_is_what_transformers_takes_it_for() -> None:
    given = {"model_type": "mamba2", "vocab_size": 61, "hidden_size": 4096, "num_hidden_layers": 2}
    ours, theirs = hf.from_hf_config(given, "config.json"), AutoConfig.for_model(**given)
    assert (ours.num_heads, ours.head_dim, ours.num_groups) == (theirs.num_heads, theirs.head_dim, theirs.n_groups)
    assert (ours.state_dim, ours.expand, ours.conv_size) == (theirs.state_size, theirs.expand, theirs.conv_kernel)
    assert (ours.norm_eps, ours.init_std, ours.tied) == (1e-5, theirs.initializer_range, theirs.tie_word_embeddings)
    assert (ours.dt_min, ours.dt_max) == (theirs.time_step_min, theirs.time_step_max)


def test_gpt2s_activation_has_three_names() -> None:
    read = [hf.from_hf_config(values(GPT2, activation_function=name), "") for name in ("gelu_fast", "gelu_pytorch_tanh")]
    assert read == [GPT2, GPT2]


def test_the_older_spelling_of_rope_is_read() -> None:
    """transformers 4 has `rope_theta` and `rope_scaling` at the top, some files with `type` for `rope_type`."""
    old = values(
        rope_theta=7e4,
        rope_scaling={
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 12,
        },
    )
    del old["rope_parameters"]
    read = hf.from_hf_config(old, "config.json")
    assert (read.rope_theta, read.rope_scaling) == (7e4, SCALING)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox"}, ["model_type", "gpt_neox", "llama", "qwen3"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["rope_type", "yarn", "llama3"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "linear"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["has no 'factor'"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor", "0.25"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_our_model_does_not_compute_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.from_hf_config(values(**changes), "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps"])
def test_a_missing_size_is_named(name: str) -> None:
    given = values()
    del given[name]
    with pytest.raises(ConfigError, match=f"config.json: has no '{name}'"):
        hf.from_hf_config(given, "config.json")


# --- safetensors


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 20_000, hf.SHARD_BYTES])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("base", [SMALL, dataclasses.replace(SMALL, qkv_bias=True), GPT2], ids=["plain", "bias", "gpt2"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, shard_bytes: int, base: Any, tied: bool) -> None:
    config = dataclasses.replace(base, tied=tied)
    written, read = scattered(config), empty(config)
    write(tmp_path, config, written, size=shard_bytes)
    hf.load_into(read, config, tmp_path)
    assert all(torch.equal(written[name], read[name]) for name in written)


def test_gpt2s_queries_keys_and_values_are_one_tensor_with_inputs_first(tmp_path: Path) -> None:
    ours = scattered(GPT2)
    write(tmp_path, GPT2, ours)
    theirs = load_file(tmp_path / "model.safetensors")
    for n in range(2):
        parts = [ours[f"layers.{n}.attention.{part}.weight"].t() for part in ("query", "key", "value")]
        assert torch.equal(theirs[f"transformer.h.{n}.attn.c_attn.weight"], torch.cat(parts, dim=1))
    assert theirs["transformer.h.1.mlp.c_fc.weight"].shape == (32, 128)


@pytest.mark.parametrize("base", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_padding_of_the_vocabulary_stays_here(tmp_path: Path, base: Any) -> None:
    config = dataclasses.replace(base, vocab_multiple=16)
    written, read = scattered(config), empty(config)
    write(tmp_path, config, written)
    assert all(61 in t.shape or 64 not in t.shape for t in load_file(tmp_path / "model.safetensors").values())
    assert values(config)["vocab_size"] == 61
    hf.load_into(read, config, tmp_path)
    for name, tensor in written.items():
        if name in ("embedding.weight", "head.weight"):
            assert not read[name][61:].any()
            assert torch.equal(read[name][:61], tensor[:61])
        else:
            assert torch.equal(read[name], tensor)


def test_no_more_than_the_tensors_of_one_file_are_held(tmp_path: Path) -> None:
    tensors, asked, alive = weights(SMALL), 0, weakref.WeakSet[Tensor]()

    def fetch(names: list[str]) -> dict[str, Tensor]:
        nonlocal asked
        asked += 1
        assert len(alive) == 0
        fetched = {name: tensors[name].clone() for name in names}
        assert sum(tensor.nbytes for tensor in fetched.values()) <= 20_000
        alive.update(fetched.values())
        return fetched

    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    hf.write_tensors(tmp_path, SMALL, shapes, fetch, torch.float32, 20_000)
    assert asked == len(list(tmp_path.glob("*.safetensors"))) > 2
    read = empty(SMALL)
    hf.load_into(read, SMALL, tmp_path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_shards_are_small_and_the_index_names_the_place_of_every_tensor(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", SMALL, weights(SMALL))
    written = load_file(tmp_path / "whole" / "model.safetensors")
    write(tmp_path, SMALL, weights(SMALL), size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert set(index["weight_map"]) == set(written)
    for file in files:
        held = load_file(tmp_path / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    write(tmp_path, SMALL, weights(SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    written = weights(SMALL)
    write(tmp_path, SMALL, written, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], written["head.weight"].bfloat16())


def changed_folder(folder: Path, config: Any, **changes: Tensor | None) -> Path:
    """The tensors of a model with some replaced, added, or (None) left out; `__` stands for a dot."""
    write(folder, config, weights(config))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm__bias": torch.zeros(32)}, "not known ['model.norm.bias']"),
        ({"model__norm__weight": None}, "missing ['model.norm.weight']"),
        ({"lm_head__weight": None}, "missing ['lm_head.weight']"),
        ({"model__norm__weight": torch.zeros(33)}, "model.norm.weight is (33,), config.json says (32,)"),
        ({"lm_head__weight": torch.zeros(32, 61)}, "lm_head.weight is (32, 61), config.json says (61, 32)"),
        ({"lm_head__weight": torch.zeros(61, 32).char()}, "lm_head.weight is of torch.int8; expected torch.float32"),
        ({"lm_head__weight": torch.zeros(61, 32).to(torch.float8_e4m3fn)}, "lm_head.weight is of torch.float8_e4m3fn"),
    ],
    ids=["extra", "missing", "untied head missing", "longer", "transposed", "integers", "float8"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, Tensor | None], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.load_into(empty(SMALL), SMALL, changed_folder(tmp_path, SMALL, **changes))
    assert str(tmp_path) in str(caught.value)
    assert words in str(caught.value)


def test_what_follows_from_the_rest_may_be_stored_beside_it(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, tied=True)
    written, read = weights(config), empty(config)
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.zeros(4)}
    head = {"lm_head__weight": written["embedding.weight"].clone()}
    hf.load_into(read, config, changed_folder(tmp_path, config, **frequencies, **head))
    assert all(torch.equal(written[name], read[name]) for name in written)


def test_a_transposed_tensor_of_gpt2_is_named_in_its_own_shape(tmp_path: Path) -> None:
    wrong = {"transformer__h__0__attn__c_attn__weight": torch.zeros(96, 32)}
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.c_attn\.weight is \(96, 32\), config\.json says \(32, 96\)"):
        hf.load_into(empty(GPT2), GPT2, changed_folder(tmp_path, GPT2, **wrong))


def test_a_gpt2_saved_without_its_head_and_with_its_masks_is_read(tmp_path: Path) -> None:
    """As the first one on the hub: no `transformer.` before the names, and the causal mask stored in every layer."""
    written, read = scattered(GPT2), empty(GPT2)
    write(tmp_path, GPT2, written)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{n}.attn.{name}": torch.ones(1, 1, 16, 16) for n in range(2) for name in ("bias", "masked_bias")}
    save_file(bare | masks, tmp_path / "model.safetensors")
    hf.load_into(read, GPT2, tmp_path)
    assert all(torch.equal(read[name], written[name]) for name in written)


def test_the_same_weights_in_another_librarys_file_are_left_alone(tmp_path: Path) -> None:
    written, read = weights(SMALL), empty(SMALL)
    write(tmp_path, SMALL, written)
    save_file({"tok_embeddings.weight": torch.zeros(61, 32)}, tmp_path / "consolidated.safetensors")
    hf.load_into(read, SMALL, tmp_path)
    assert all(torch.equal(read[name], written[name]) for name in written)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, SMALL, weights(SMALL))
    write(tmp_path, SMALL, weights(SMALL), size=20_000)
    with pytest.raises(ConfigError, match=r"is in model-0000.-of-0000.\.safetensors and in model\.safetensors; remove"):
        hf.load_into(empty(SMALL), SMALL, tmp_path)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ConfigError, match="Pickled weights"):
        hf.load_into(empty(SMALL), SMALL, tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = changed_folder(tmp_path, SMALL) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors: is not a whole safetensors file"):
        hf.load_into(empty(SMALL), SMALL, tmp_path)


def test_a_lost_shard_is_missing_tensors(tmp_path: Path) -> None:
    write(tmp_path, SMALL, weights(SMALL), size=20_000)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"missing \['model\.embed_tokens\.weight'"):
        hf.load_into(empty(SMALL), SMALL, tmp_path)


# --- the same model there and here

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT2_SIZES = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
MAMBA_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 6}
MAMBA_SIZES |= {"n_groups": 1, "initializer_range": 0.2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    ("llama", {"num_key_value_heads": 4, "head_dim": 16, "rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": 7}),
    ("mistral", {"sliding_window": 1, "head_dim": 16}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 40, "num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    ("gpt2", {}),
    ("gpt2", {"n_inner": 40, "tie_word_embeddings": False, "n_layer": 3}),
    ("gpt2", {"n_head": 1, "layer_norm_epsilon": 1e-2, "activation_function": "gelu_fast"}),
    ("mamba2", {}),  # 50 tokens are one chunk of theirs, and one of ours
    ("mamba2", {"n_groups": 2, "tie_word_embeddings": True, "chunk_size": 16}),
    ("mamba2", {"n_groups": 4, "conv_kernel": 2, "residual_in_fp32": False, "chunk_size": 7, "num_hidden_layers": 3}),
    ("mamba2", {"expand": 3, "num_heads": 6, "head_dim": 16, "n_groups": 1, "layer_norm_epsilon": 1e-3}),
]


def from_transformers(kind: str, options: dict[str, Any]) -> Any:
    """A model with random weights of their own making; biases and gains, which they begin at 0 and 1, are moved."""
    torch.manual_seed(0)
    sizes = {"gpt2": GPT2_SIZES, "mamba2": MAMBA_SIZES}.get(kind, SIZES)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return theirs


@pytest.mark.parametrize(("kind", "options"), THEIRS, ids=str)
def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    theirs = from_transformers(kind, options)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    config = hf.from_hf_config(json.loads((tmp_path / "theirs" / "config.json").read_text()), "config.json")
    ours = config.build()
    init_weights(ours, torch.Generator().manual_seed(0))
    ours.eval()
    parameters = dict(ours.named_parameters())
    hf.load_into(parameters, config, tmp_path / "theirs")

    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5  # else the tolerance would say nothing
    assert (ours(tokens) - expected).abs().max() <= 1e-4

    (ours.losses(Batch(tokens, targets))["nll"] / 98).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
    (tmp_path / "gradients").mkdir()
    save_file({name: p.grad for name, p in theirs.named_parameters()}, tmp_path / "gradients" / "model.safetensors")
    gradients = {name: torch.empty_like(p) for name, p in parameters.items()}
    hf.load_into(gradients, config, tmp_path / "gradients")
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():  # that of GPT-2's key biases is zero, up to rounding
        assert parameters[name].grad is not None, name
        assert (parameters[name].grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize(("kind", "options"), THEIRS, ids=str)
def test_what_came_in_goes_out_byte_for_byte_and_loads_there(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    theirs = from_transformers(kind, options)
    theirs.save_pretrained(tmp_path / "theirs")
    config = hf.from_hf_config(json.loads((tmp_path / "theirs" / "config.json").read_text()), "config.json")
    tensors = empty(config)
    hf.load_into(tensors, config, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", config, tensors)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values(config)))
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.randint(61, (2, 50), generator=torch.Generator().manual_seed(1))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (again(tokens).logits - theirs(tokens).logits).abs().max() <= 1e-5  # gelu_fast comes back as gelu_new

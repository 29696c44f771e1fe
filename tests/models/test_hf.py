"""Hugging Face's config.json and safetensors: what is read and written, and what is refused with which words."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from franca.core.errors import ConfigError
from franca.models import hf
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights

SMALL = LlamaConfig(
    vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=16, init_std=0.25
)
SCALING = RopeScaling(factor=4.0, low_freq_factor=1.5, high_freq_factor=3.0, original_max_position_embeddings=12)


def weights(config: LlamaConfig) -> dict[str, Tensor]:
    model = config.build()
    init_weights(model, torch.Generator().manual_seed(0))
    return {name: p.detach() for name, p in model.named_parameters()}


def empty(config: LlamaConfig) -> dict[str, Tensor]:
    return {name: torch.full_like(p, torch.nan) for name, p in config.build().named_parameters()}


def values(**changes: Any) -> dict[str, Any]:
    return {**hf.to_hf_config(SMALL, {"bos": None, "eos": 0}, torch.float32), **changes}


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
    ],
    ids=str,
)
def test_a_config_survives_the_way_there_and_back(options: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **options)
    written = json.loads(json.dumps(hf.to_hf_config(config, {"bos": 1, "eos": 2}, torch.bfloat16)))
    assert hf.from_hf_config(written, "config.json") == config


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
        ({"use_sliding_window": True}, ["use_sliding_window", "True"]),
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
def test_tensors_come_back_bit_for_bit(tmp_path: Path, shard_bytes: int, tied: bool) -> None:
    config = dataclasses.replace(SMALL, tied=tied)
    written, read = weights(config), empty(config)
    hf.write_tensors(tmp_path, hf.tensors_for(config, written, torch.float32), shard_bytes)
    hf.load_into(read, config, tmp_path)
    assert all(torch.equal(written[name], read[name]) for name in written)


def test_shards_are_small_and_the_index_names_the_place_of_every_tensor(tmp_path: Path) -> None:
    written = dict(hf.tensors_for(SMALL, weights(SMALL), torch.float32))
    hf.write_tensors(tmp_path, written.items(), shard_bytes=20_000)
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
    hf.write_tensors(tmp_path, hf.tensors_for(SMALL, weights(SMALL), torch.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    written = weights(SMALL)
    hf.write_tensors(tmp_path, hf.tensors_for(SMALL, written, torch.bfloat16))
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["lm_head.weight"], written["head.weight"].bfloat16())


def changed_folder(folder: Path, config: LlamaConfig, **changes: Tensor | None) -> Path:
    """The tensors of a model with some replaced, added, or (None) left out; `__` stands for a dot."""
    tensors = dict(hf.tensors_for(config, weights(config), torch.float32))
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
    ],
    ids=["extra", "missing", "untied head missing", "longer", "transposed"],
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
    hf.write_tensors(tmp_path, hf.tensors_for(SMALL, weights(SMALL), torch.float32), shard_bytes=20_000)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"missing \['model\.embed_tokens\.weight'"):
        hf.load_into(empty(SMALL), SMALL, tmp_path)

"""Hugging Face's names and folders: `config.json` to our config and back, tensors from and to safetensors.

What it refuses to know: tokenizers, checkpoints, devices. A tensor that has no place on the other side is an error, never
left out in silence.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from franca.core.config import check, problems_error
from franca.core.errors import ConfigError
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig

SHARD_BYTES = 5_000_000_000
FAMILIES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {  # ours -> theirs
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "tied": "tie_word_embeddings",
}
OPTIONAL = ("num_kv_heads", "head_dim", "init_std", "tied")  # left out, they mean what they mean to us
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # what our model computes


def to_hf_config(c: LlamaConfig, special: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a model: Llama's, or Qwen 3's with `qk_norm`. `special`: its `bos` and `eos` ids."""
    c = replace(c, num_kv_heads=c.num_kv_heads or c.num_heads, head_dim=c.width_of_head, mlp_dim=c.width_of_mlp)
    family = "qwen3" if c.qk_norm else "llama"
    scaling = None
    if c.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(c.rope_scaling)}
    return {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        **{theirs: getattr(c, ours) for ours, theirs in NAMES.items()},
        **FIXED,
        # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters: both are written.
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
        **{f"{name}_token_id": special.get(name) for name in ("bos", "eos")},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def from_hf_config(values: dict[str, Any], where: str) -> LlamaConfig:
    """Our config for a `config.json`. Raises ConfigError for a family or an option that our model does not compute."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{where}: model_type {family!r} cannot be imported; expected 'llama' or 'qwen3'")
    given = {"rope_theta": 10000.0, **values, **(values.get("rope_parameters") or values.get("rope_scaling") or {})}
    for name, allowed in {**FIXED, "use_sliding_window": False, "partial_rotary_factor": 1.0}.items():
        if given.get(name, allowed) != allowed:
            raise ConfigError(f"{where}: {name} is {given[name]!r}; only {allowed!r} can be imported")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope_type {rope_type!r} cannot be imported; expected 'default' or 'llama3'")
    try:
        shape = {ours: values[theirs] for ours, theirs in NAMES.items() if theirs in values or ours not in OPTIONAL}
        scaling = {field.name: given[field.name] for field in fields(RopeScaling)} if rope_type == "llama3" else None
    except KeyError as error:
        raise ConfigError(f"{where}: has no {error.args[0]!r}") from None
    shape |= {"rope_theta": given["rope_theta"], "rope_scaling": scaling, "qk_norm": family == "qwen3"}
    config = check(LlamaConfig, shape, where)
    if found := config.problems():
        raise problems_error(where, found)
    return config


def their_names(c: LlamaConfig, parameters: Iterable[str]) -> dict[str, str]:
    """Our parameter names -> Hugging Face's."""
    return {n: c.hf_names[re.sub(r"\d+", "{}", n, count=1)].format(*re.findall(r"\d+", n)) for n in parameters}


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Named tensors as `model.safetensors`, or as `model-NNNNN-of-NNNNN.safetensors` and their index."""
    save_torch_state_dict(dict(tensors), folder, max_shard_size=shard_bytes)


def load_into(parameters: dict[str, Tensor], c: LlamaConfig, folder: Path) -> None:
    """Copy a folder's tensors into our parameters. Raises ConfigError for what is missing, left over, broken or misshapen."""
    stored = _find_tensors(folder)
    names = their_names(c, parameters)
    # Stored by some exporters, though it follows from the rest: a tied head, the frequencies of RoPE.
    implied = {name for name in stored if name.endswith("rotary_emb.inv_freq") or (c.tied and name == "lm_head.weight")}
    missing = [name for name in names.values() if name not in stored]
    extra = [name for name in stored if name not in names.values() and name not in implied]
    if missing or extra:
        raise ConfigError(f"{folder}: tensors do not fit: missing {missing[:5] or 'none'}, not known {extra[:5] or 'none'}")
    for ours, theirs in names.items():
        with safe_open(stored[theirs], framework="pt") as opened:
            tensor = opened.get_tensor(theirs)
        if tensor.shape != parameters[ours].shape:
            raise ConfigError(f"{folder}: {theirs} is {tuple(tensor.shape)}, config.json says {tuple(parameters[ours].shape)}")
        with torch.no_grad():
            parameters[ours].copy_(tensor)


def _find_tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor in a folder's safetensors. Pickled weights are never read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: has no *.safetensors. Pickled weights (.bin, .pt) are not read: convert them first.")
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except SafetensorError as error:
            raise ConfigError(f"{file}: is not a whole safetensors file ({error}). Download it again.") from None
    return found


def tensors_for(c: LlamaConfig, parameters: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names, in `dtype`."""
    for ours, theirs in their_names(c, parameters).items():
        yield theirs, parameters[ours].detach().to(device="cpu", dtype=dtype)

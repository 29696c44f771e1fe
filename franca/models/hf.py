"""Hugging Face's names and folders: `config.json` to our config and back, tensors streamed from and to safetensors.

What it refuses to know: tokenizers, checkpoints, devices. A tensor that has no place on the other side is an error, never
left out in silence.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from franca.core.config import check, problems_error
from franca.core.errors import ConfigError
from franca.models.base import expand_names
from franca.models.llama import LlamaConfig

SHARD_BYTES = 5_000_000_000
ROPE_NAMES = {  # ours -> theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_seq_len": "original_max_position_embeddings",
}


def to_hf_config(c: LlamaConfig, bos: int | None, eos: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a model: Llama's, or Qwen 3's with `qk_norm`."""
    assert c.vocab_size is not None
    family = ("qwen3", "Qwen3ForCausalLM") if c.qk_norm else ("llama", "LlamaForCausalLM")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **{theirs: getattr(c.rope_scaling, ours) for ours, theirs in ROPE_NAMES.items()}}
    # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters: both are written.
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if c.rope_scaling else None
    return {
        "model_type": family[0],
        "architectures": [family[1]],
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.width_of_mlp,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads or c.num_heads,
        "head_dim": c.width_of_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def from_hf_config(values: dict[str, Any], where: str) -> LlamaConfig:
    """Our config for a `config.json`.

    Raises:
        ConfigError: for a family or an option that our model does not compute.
    """
    family = values.get("model_type")
    if family not in ("llama", "qwen3"):
        raise ConfigError(f"{where}: model_type {family!r} cannot be imported; expected 'llama' or 'qwen3'")
    for name, allowed in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("use_sliding_window", False),
    ):
        if values.get(name, allowed) != allowed:
            raise ConfigError(f"{where}: {name} is {values[name]!r}; only {allowed!r} can be imported")
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta", 10000.0),
        **(values.get("rope_scaling") or {}),
    }
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope_type {rope_type!r} cannot be imported; expected 'default' or 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 can be imported")
    try:
        scaling = {ours: rope[theirs] for ours, theirs in ROPE_NAMES.items()} if rope_type == "llama3" else None
        shape = {
            "vocab_size": values["vocab_size"],
            "dim": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "num_heads": values["num_attention_heads"],
            "num_kv_heads": values.get("num_key_value_heads"),
            "head_dim": values.get("head_dim"),
            "mlp_dim": values["intermediate_size"],
            "max_seq_len": values["max_position_embeddings"],
            "norm_eps": values["rms_norm_eps"],
            "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
            "rope_scaling": scaling,
            "tied": values.get("tie_word_embeddings", False),
            "qk_norm": family == "qwen3",
            "init_std": values.get("initializer_range", 0.02),
        }
    except KeyError as error:
        raise ConfigError(f"{where}: has no {error.args[0]!r}") from None
    config = check(LlamaConfig, shape, where)
    if found := config.problems():
        raise problems_error(where, found)
    return config


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Stream named tensors into `model-NNNNN-of-NNNNN.safetensors` and their index; holds one shard in memory."""
    parts: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            path = folder / f"part-{len(parts)}.safetensors"
            save_file(pending, path, metadata={"format": "pt"})
            parts.append((path, list(pending)))
        pending, size = {}, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, 1):
        final = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Every tensor of a folder's safetensors by name, each read when it is called for. Pickled weights are never read.

    Raises:
        ConfigError: when there are no safetensors, or a file is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: has no *.safetensors. Pickled weights (.bin, .pt) are not read: convert them first.")
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: _reader(file, name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ConfigError(f"{file}: is not a whole safetensors file ({error}). Download it again.") from None
    return found


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with ExitStack() as stack:
            return cast(Tensor, stack.enter_context(safe_open(file, framework="pt")).get_tensor(name))

    return read


def load_into(parameters: dict[str, Tensor], c: LlamaConfig, folder: Path) -> None:
    """Copy a folder's tensors into our parameters; every tensor must find its place, with its shape.

    Raises:
        ConfigError: that lists what is missing, left over or of another shape.
    """
    stored = read_tensors(folder)
    names = expand_names(c.hf_names, list(parameters))
    missing = [theirs for theirs in names.values() if theirs not in stored]
    extra = [name for name in stored if name not in names.values() and not _implied(name, c)]
    if missing or extra:
        raise ConfigError(f"{folder}: tensors do not fit: missing {missing[:5] or 'none'}, not known {extra[:5] or 'none'}")
    for ours, theirs in names.items():
        tensor = stored[theirs]()
        if tensor.shape != parameters[ours].shape:
            raise ConfigError(f"{folder}: {theirs} is {tuple(tensor.shape)}, config.json says {tuple(parameters[ours].shape)}")
        with torch.no_grad():
            parameters[ours].copy_(tensor)


def _implied(name: str, c: LlamaConfig) -> bool:
    """Stored by some exporters, though it follows from the rest: a tied head, the frequencies of RoPE."""
    return (c.tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def tensors_for(c: LlamaConfig, parameters: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under Hugging Face's names, in `dtype`."""
    for ours, theirs in expand_names(c.hf_names, list(parameters)).items():
        yield theirs, parameters[ours].detach().to(device="cpu", dtype=dtype)

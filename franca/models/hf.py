"""Hugging Face's names and folders: `config.json` to our config and back, tensors from and to safetensors.

Each family says what its tensors are called there (`hf_names`); what its `config.json` says stands here. The end of a name may
be one of `FORMS`; several of ours under one name are joined along the first dimension, in the order of the table. A model that
fits no family keeps our names, behind `model.`, and its own code goes with it (`models.modeling`).
What it refuses to know: tokenizers, checkpoints, devices. A tensor that has no place on the other side is an error, never
left out in silence.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from franca.core.config import check, problems_error
from franca.core.errors import ConfigError
from franca.models import modeling
from franca.models.base import ModelConfig
from franca.models.decoder import TrunkConfig
from franca.models.gpt2 import GPT2Config
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig

SHARD_BYTES = 5_000_000_000
Values = dict[str, Any]  # of a config.json
Fetch = Callable[[list[str]], dict[str, Tensor]]  # our names -> our tensors

# How theirs is made of ours, and ours of theirs, by the end of the name; what is in brackets is not written.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    r"(\.T)$": (Tensor.t, Tensor.t),
    r"\.conv1d\.weight()$": (lambda t: t.unsqueeze(1), lambda t: t.squeeze(1)),
    r"(:ours)$": (lambda t: t, lambda t: t),
}
# Stored by some exporters though it follows from the rest: the frequencies of RoPE, GPT-2's causal mask.
IMPLIED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
READABLE = (torch.float32, torch.bfloat16, torch.float16)


def _read_llama(given: Values, where: str) -> Values:
    given = {"rope_theta": 10000.0, **given, **(given.get("rope_parameters") or given.get("rope_scaling") or {})}
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor is {given['partial_rotary_factor']!r}; only 1.0 can be imported")
    rope_type = given.get("rope_type", given.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope_type {rope_type!r} cannot be imported; expected 'default' or 'llama3'")
    scaling = {f.name: _take(given, f.name, where) for f in fields(RopeScaling)} if rope_type == "llama3" else None
    return {"rope_theta": given["rope_theta"], "rope_scaling": scaling}


def _write_llama(c: LlamaConfig) -> Values:
    scaling = None if c.rope_scaling is None else {"rope_type": "llama3", **vars(c.rope_scaling)}
    return {
        "num_key_value_heads": c.num_kv_heads or c.num_heads,
        "head_dim": c.width_of_head,
        "intermediate_size": c.width_of_mlp,
        # transformers 4 reads rope_theta and rope_scaling, transformers 5 reads rope_parameters: both are written.
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
    }


def _read_qwen(given: Values, where: str) -> Values:
    """The window is for the layers from `max_window_layers` on; ours is for all layers or none."""
    window = given["sliding_window"] if given["use_sliding_window"] else None
    first = given["max_window_layers"] if window else given["num_hidden_layers"]
    windowed = [number >= first for number in range(given["num_hidden_layers"])]
    if given.get("layer_types"):
        windowed = [kind == "sliding_attention" for kind in given["layer_types"]]
    if any(windowed) and not (window and all(windowed)):
        what = f"{sum(windowed)} of {len(windowed)} layers have a window, sliding_window is {window}"
        raise ConfigError(f"{where}: {what}; only one window for all layers, or none, can be imported")
    return {**_read_llama(given, where), "window": window if any(windowed) else None}


def _write_qwen(c: LlamaConfig) -> Values:
    window = {"use_sliding_window": bool(c.window), "sliding_window": c.window}
    return {**_write_llama(c), **window, "max_window_layers": 0 if c.window else c.num_layers}


_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _read_gpt2(given: Values, where: str) -> Values:
    rates = {name: given[name] for name in _DROPOUTS}
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        raise ConfigError(f"{where}: {told}; only one rate of dropout for all three can be imported")
    return {"dropout": rates["resid_pdrop"]}


def _write_gpt2(c: GPT2Config) -> Values:
    return dict.fromkeys(_DROPOUTS, c.dropout)


def _read_mamba(given: Values, where: str) -> Values:
    inner, heads = given["expand"] * _take(given, "hidden_size", where), given["num_heads"] * given["head_dim"]
    if inner != heads:
        raise ConfigError(f"{where}: num_heads * head_dim is {heads}, expand * hidden_size is {inner}; they must be equal")
    bounds = [bound["__float__"] if isinstance(bound, dict) else bound for bound in given["time_step_limit"]]
    if [float(bound) for bound in bounds] != [0.0, math.inf]:
        raise ConfigError(f"{where}: time_step_limit is {bounds}; only steps of time without limits can be imported")
    return {}


def _write_mamba(c: MambaConfig) -> Values:
    return {"num_heads": c.num_heads, "time_step_rank": math.ceil(c.dim / 16)}


@dataclass(frozen=True)
class Family:
    """What the `config.json` of one `model_type` says."""

    config: type[TrunkConfig]
    architecture: str
    names: dict[str, str]  # our option -> theirs
    read: Callable[[Values, str], Values]  # further options of ours, from theirs
    write: Callable[[Any], Values]  # further options of theirs, from ours
    ours: Values = field(default_factory=dict)  # what ours must be for this family
    defaults: Values = field(default_factory=dict)  # theirs that may be left out, and what they then are
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # theirs that our model computes; the first is written


def _names(table: str) -> dict[str, str]:
    """Words `ours=theirs` as a dict."""
    return dict(word.split("=") for word in table.split())


_SHARED = _names("vocab_size=vocab_size init_std=initializer_range tied=tie_word_embeddings")
_LLAMA = Family(
    LlamaConfig,
    "LlamaForCausalLM",
    _SHARED
    | _names(
        "dim=hidden_size num_layers=num_hidden_layers num_heads=num_attention_heads "
        "num_kv_heads=num_key_value_heads head_dim=head_dim mlp_dim=intermediate_size "
        "max_seq_len=max_position_embeddings norm_eps=rms_norm_eps"
    ),
    _read_llama,
    _write_llama,
    ours={"mlp": "swiglu", "qkv_bias": False, "qk_norm": False, "window": None},
    defaults={"num_key_value_heads": None, "head_dim": None, "initializer_range": 0.02, "tie_word_embeddings": False},
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "attention_dropout": (0.0, None)},
)
_MISTRAL = replace(
    _LLAMA,
    architecture="MistralForCausalLM",
    names=_LLAMA.names | {"window": "sliding_window"},
    ours={name: value for name, value in _LLAMA.ours.items() if name != "window"},
    defaults=_LLAMA.defaults | {"num_key_value_heads": 8, "sliding_window": 4096},
)
_QWEN3 = replace(
    _LLAMA,
    architecture="Qwen3ForCausalLM",
    read=_read_qwen,
    write=_write_qwen,
    ours=_MISTRAL.ours | {"qk_norm": True},
    defaults=_LLAMA.defaults
    | {"num_key_value_heads": 32, "head_dim": 128}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
)
_QWEN2 = replace(
    _QWEN3,
    architecture="Qwen2ForCausalLM",
    ours=_MISTRAL.ours | {"qkv_bias": True},
    defaults=_QWEN3.defaults | {"head_dim": None},
    fixed={name: allowed for name, allowed in _LLAMA.fixed.items() if name != "attention_bias"},
)
_GPT2 = Family(
    GPT2Config,
    "GPT2LMHeadModel",
    _SHARED
    | _names(
        "dim=n_embd num_layers=n_layer num_heads=n_head mlp_dim=n_inner max_seq_len=n_positions norm_eps=layer_norm_epsilon"
    ),
    _read_gpt2,
    _write_gpt2,
    defaults={"n_inner": None, "initializer_range": 0.02, "tie_word_embeddings": True} | dict.fromkeys(_DROPOUTS, 0.1),
    fixed={  # the activations are one function under three names
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
_MAMBA = Family(
    MambaConfig,
    "Mamba2ForCausalLM",
    _SHARED
    | _names(
        "dim=hidden_size num_layers=num_hidden_layers head_dim=head_dim state_dim=state_size num_groups=n_groups "
        "expand=expand conv_size=conv_kernel dt_min=time_step_min dt_max=time_step_max "
        "max_seq_len=max_position_embeddings norm_eps=layer_norm_epsilon"
    ),
    _read_mamba,
    _write_mamba,
    ours={"kind": "mamba", "dt_bias": True},
    defaults={"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "expand": 2, "conv_kernel": 4}
    | {"layer_norm_epsilon": 1e-5, "initializer_range": 0.1, "tie_word_embeddings": False}
    | {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_limit": (0.0, math.inf)}
    | {"max_position_embeddings": 2048},  # they do not say it, and the model has no limit
    fixed={  # chunk_size may be any; transformers does not look at norm_before_gate, and gates before the norm
        "hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "rms_norm": (True,),
        "residual_in_fp32": (False, True),
    },
)
# By `model_type`; a config of ours is the first family that it fits.
FAMILIES = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3, "gpt2": _GPT2, "mamba2": _MAMBA}


def to_hf_config(c: ModelConfig, special: Mapping[str, Any], dtype: torch.dtype) -> Values:
    """The `config.json` of a model. `special`: its `bos` and `eos` ids."""
    values, kind = modeling.to_config(c), family_of(c)
    if kind is not None:
        family = FAMILIES[kind]
        values = {
            "model_type": kind,
            "architectures": [family.architecture],
            **{theirs: getattr(c, ours) for ours, theirs in family.names.items()},
            **{name: allowed[0] for name, allowed in family.fixed.items()},
            **family.write(c),
        }
    return {
        **values,
        **{f"{name}_token_id": special.get(name) for name in ("bos", "eos")},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": kind is not None,
    }


def family_of(c: ModelConfig) -> str | None:
    """The first of `FAMILIES` that computes what our model computes; None: its code goes with it."""
    for kind, family in FAMILIES.items():
        # a class below ours may be a user's, which computes something else
        if type(c) is family.config and all(getattr(c, name) == value for name, value in family.ours.items()):
            return kind
    return None


def from_hf_config(values: Values, where: str) -> Any:
    """Our config for a `config.json`. Raises ConfigError for a family or an option that our model does not compute."""
    kind = values.get("model_type")
    if kind == modeling.MODEL_TYPE:
        return _sound(modeling.from_config(values, where), where)
    if kind not in FAMILIES:
        raise ConfigError(f"{where}: model_type {kind!r} cannot be imported; expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for name, allowed in family.fixed.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{where}: {name} is {values[name]!r}; only {allowed[0]!r} can be imported")
    given = {**family.defaults, **values}
    shape = {**family.ours, **{ours: _take(given, theirs, where) for ours, theirs in family.names.items()}}
    try:
        shape |= family.read(given, where)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: holds a value of another type than it should ({error})") from None
    return _sound(check(family.config, shape, where), where)


def _sound(config: Any, where: str) -> Any:
    if found := config.problems():
        raise problems_error(where, found)
    return config


def _take(values: Values, name: str, where: str) -> Any:
    if name not in values:
        raise ConfigError(f"{where}: has no {name!r}")
    return values[name]


def their_names(c: ModelConfig, parameters: Iterable[str], own: bool = False) -> dict[str, str]:
    """Our parameter names -> Hugging Face's, with their forms. `own`: in a folder with its own code."""
    if own:
        return {n: f"model.{n}:ours" for n in parameters}
    return {n: c.hf_names[_pattern(n)].format(*re.findall(r"\d+", n)) for n in parameters}


def _pattern(ours: str) -> str:
    return re.sub(r"\d+", "{}", ours, count=1)


def _places(c: ModelConfig, parameters: Iterable[str], own: bool) -> dict[str, list[str]]:
    """Hugging Face's names, with their forms -> those of ours that they are made of, in order."""
    places: dict[str, list[str]] = {}
    for ours, theirs in their_names(c, parameters, own).items():
        places.setdefault(theirs, []).append(ours)
    if own:
        return places
    order = list(c.hf_names)
    return {theirs: sorted(ours, key=lambda name: order.index(_pattern(name))) for theirs, ours in places.items()}


def _split_form(theirs: str) -> tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    for end, (there, back) in FORMS.items():
        if found := re.search(end, theirs):
            return theirs[: found.start(1)], there, back
    return theirs, lambda x: x, lambda x: x


def _rows(c: ModelConfig, ours: str, tensor: Tensor) -> int:
    """Rows of a tensor of ours that they have too: all but the padding of the vocabulary."""
    padded = re.fullmatch(r"(embedding|head|future_heads\.\d+)\.weight", ours)
    return c.vocab_size if padded and c.vocab_size is not None else len(tensor)


def write_tensors(
    folder: Path,
    c: ModelConfig,
    shapes: Mapping[str, Tensor],
    fetch: Fetch,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A model as `model.safetensors`, or as `model-NNNNN-of-NNNNN.safetensors` and their index.

    `shapes`: our tensors or ones like them on the meta device. `fetch` is asked for those of one file at a time, and what it
    gave is forgotten before it is asked again.
    """
    shards: list[dict[str, list[str]]] = []
    total, size = 0, shard_bytes
    for theirs, ours in _places(c, shapes, own=family_of(c) is None).items():
        nbytes = dtype.itemsize * sum(_rows(c, n, shapes[n]) * shapes[n][:1].numel() for n in ours)
        if size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][theirs] = ours
        size, total = size + nbytes, total + nbytes
    place_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        place_of |= dict.fromkeys(_write_shard(folder / file, c, shard, fetch, dtype), file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": place_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_shard(path: Path, c: ModelConfig, shard: dict[str, list[str]], fetch: Fetch, dtype: torch.dtype) -> list[str]:
    """Returns their names of the tensors in it."""
    held, tensors = fetch([name for ours in shard.values() for name in ours]), {}
    for theirs, ours in shard.items():
        parts = [(t := held.pop(name))[: _rows(c, name, t)].detach().to(device="cpu", dtype=dtype) for name in ours]
        name, there, _ = _split_form(theirs)
        tensors[name] = there(torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()
        del parts, t  # no more than one tensor of the file is held twice
    save_file(tensors, path, metadata={"format": "pt"})
    return list(tensors)


def load_into(parameters: Mapping[str, Tensor], c: ModelConfig, folder: Path, own: bool = False) -> None:
    """Copy a folder's tensors into our parameters; `own`: of one with its own code.

    Raises ConfigError for what is missing, left over, broken or misshapen.
    """
    stored = _find_tensors(folder, prefix="model" if own else c.hf_names["embedding.weight"].split(".")[0])
    tied = "head.weight" not in parameters
    places = _places(c, parameters, own)
    names = [_split_form(theirs)[0] for theirs in places]
    known = {*names, "lm_head.weight"} if tied else set(names)
    missing = [name for name in names if name not in stored]
    extra = [name for name in stored if name not in known and not IMPLIED.search(name)]
    if missing or extra:
        raise ConfigError(f"{folder}: tensors do not fit: missing {missing[:5] or 'none'}, not known {extra[:5] or 'none'}")
    for theirs, ours in places.items():
        name, there, back = _split_form(theirs)
        file, key = stored[name]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(key)
        rows = [_rows(c, n, parameters[n]) for n in ours]
        shape = tuple(there(torch.empty(sum(rows), *parameters[ours[0]].shape[1:], device="meta")).shape)
        if tensor.shape != shape:
            raise ConfigError(f"{folder}: {name} is {tuple(tensor.shape)}, config.json says {shape}")
        if tensor.dtype not in READABLE:
            allowed = ", ".join(map(str, READABLE))
            raise ConfigError(f"{folder}: {name} is of {tensor.dtype}; expected {allowed}. Quantized weights are not read.")
        with torch.no_grad():
            for n, part in zip(ours, back(tensor).split(rows), strict=True):
                parameters[n][: len(part)].copy_(part)
                parameters[n][len(part) :].zero_()


def _find_tensors(folder: Path, prefix: str) -> dict[str, tuple[Path, str]]:
    """The place of every tensor in a folder's safetensors: its file and its name there. Pickled weights are never read.

    Folders that were saved without the head name their tensors without the first word, `prefix`.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: has no *.safetensors. Pickled weights (.bin, .pt) are not read: convert them first.")
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file}: is not a whole safetensors file ({error}). Download it again.") from None
        for name in names:
            if name in found:
                raise ConfigError(f"{folder}: {name} is in {found[name][0].name} and in {file.name}; remove one of the files")
            found[name] = (file, name)
    if not any(name.startswith(f"{prefix}.") for name in found):
        found = {name if name == "lm_head.weight" else f"{prefix}.{name}": place for name, place in found.items()}
    return found

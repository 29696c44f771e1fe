"""Between our checkpoints and Hugging Face folders, and from either to a model that can speak."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from franca.checkpoint import sharded
from franca.checkpoint.store import Checkpoint, Store, find
from franca.core.config import Precision, check, to_dict
from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically
from franca.data.tokenizer import Tokenizer
from franca.models import hf
from franca.models.base import ModelConfig
from franca.models.llama import LlamaConfig
from franca.parallel.apply import DTYPES
from franca.parallel.world import World

ONE = World(0, 1, 0, torch.device("cpu"))


def params(model: ModelConfig, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What `params.json` says: the model's shape, and the special tokens that its data was made with."""
    return {"model": to_dict(model), "tokenizer": tokenizer}


def write_params(folder: Path, values: dict[str, Any], tokenizer: Path) -> None:
    """A checkpoint is complete in itself: the model's shape and the tokenizer lie beside the weights."""
    write_atomically(folder / "params.json", json.dumps(values, indent=2))
    write_atomically(folder / "tokenizer.json", tokenizer.read_bytes())


def model_config(checkpoint: Checkpoint) -> ModelConfig:
    from franca.core.config import config

    @config
    class Section:
        model: ModelConfig

    return check(Section, {"model": checkpoint.params["model"]}, str(checkpoint.path / "params.json")).model


def is_hf_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / "meta.json").is_file()


def open_model(path: Path, device: torch.device, precision: Precision) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """A run, a checkpoint or a Hugging Face folder as (model in evaluation mode, tokenizer, its bos and eos ids).

    The parameters are held in the precision of the products: half the memory in bf16.
    """
    if is_hf_folder(path):
        config = hf.from_hf_config(_read_json(path / "config.json"), str(path / "config.json"))
        model = _empty(config)
        hf.load_into(dict(model.named_parameters()), config, path)
        special = {name: _first(_read_json(path / "config.json").get(f"{name}_token_id")) for name in ("bos", "eos")}
        tokenizer = Tokenizer.load(path / "tokenizer.json")
    else:
        checkpoint = find(path)
        model = _empty(model_config(checkpoint))
        sharded.load(checkpoint, _named(model), num_ranks=1)
        special = checkpoint.params["tokenizer"]
        tokenizer = Tokenizer.load(checkpoint.path / "tokenizer.json")
    dtype = DTYPES[precision]
    model.compute_dtype = dtype
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False), tokenizer, special


def _empty(config: ModelConfig) -> Any:
    """A model on the CPU whose parameters are waiting for their values; its buffers are set."""
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device="cpu")
    for module in model.modules():
        if module._buffers and not module._parameters:
            module.reset()
    return model


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _first(value: Any) -> int | None:
    """Some configs list several end tokens; the first one ends a text."""
    return value[0] if isinstance(value, list) else value


def _new_folder(path: Path) -> Path:
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another folder or remove it")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def export(source: Path, output: Path, precision: Precision = "fp32") -> None:
    """Write a run's newest checkpoint, or a checkpoint, as a Hugging Face folder that transformers loads as it is."""
    checkpoint = find(source)
    config = model_config(checkpoint)
    if not isinstance(config, LlamaConfig):
        raise ConfigError(f"{source}: models of kind {checkpoint.params['model']['kind']!r} have no Hugging Face counterpart")
    partial = _new_folder(output)
    model, tokenizer, special = open_model(checkpoint.path, ONE.device, "fp32")
    dtype = DTYPES[precision]
    hf.write_tensors(partial, hf.tensors_for(config, dict(model.named_parameters()), dtype))
    values = hf.to_hf_config(config, special.get("bos"), special.get("eos"), dtype)
    (partial / "config.json").write_text(json.dumps(values, indent=2))
    (partial / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": tokenizer.backend.id_to_token(special[name])
            for name in ("bos", "eos")
            if special.get(name) is not None
        },
    }
    (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    generation = {f"{name}_token_id": special[name] for name in ("bos", "eos") if special.get(name) is not None}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2))
    partial.rename(output)
    sync_folder(output.parent)


def import_folder(source: Path, output: Path) -> None:
    """A Hugging Face folder as a run folder with one checkpoint, weights only, at step 0."""
    if not is_hf_folder(source):
        raise ConfigError(f"{source}: is not a Hugging Face folder (it has no config.json)")
    partial = _new_folder(output)
    model, _, special = open_model(source, ONE.device, "fp32")

    def beside(folder: Path) -> None:
        write_params(folder, params(model.config, special), source / "tokenizer.json")

    facts = {"samples": 0, "tokens": 0, "plan": None, "weights_only": True, "imported_from": source.name}
    sharded.save(Store(partial / "checkpoints"), 0, _named(model), facts, beside, ONE)
    partial.rename(output)
    sync_folder(output.parent)

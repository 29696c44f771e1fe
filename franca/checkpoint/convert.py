"""Between our checkpoints and Hugging Face folders, and from either to a model that can speak."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from franca.checkpoint import sharded
from franca.checkpoint.store import Store, find, read_json
from franca.core.config import Precision, check, config, to_dict
from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically
from franca.data.tokenizer import Tokenizer
from franca.models import hf
from franca.models.base import ModelConfig, owners
from franca.models.llama import LlamaConfig
from franca.parallel.apply import DTYPES
from franca.parallel.world import World

ONE = World(0, 1, 0, torch.device("cpu"))
Special = dict[str, int | list[int] | None]  # `bos` and `eos`: an id, several of which each ends a text, or no such token


@config
class Params:
    """What `params.json` says: the model's shape, and the special tokens that its data was made with."""

    model: ModelConfig
    tokenizer: Special


def ids_of(special: Special, name: str) -> list[int]:
    """All ids of `bos` or `eos`, the usual one first."""
    value = special.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def params_writer(model: ModelConfig, special: Special, tokenizer: Path) -> Callable[[Path], None]:
    """What makes a checkpoint complete in itself: it writes the model's shape and the tokenizer beside the weights."""

    def write(folder: Path) -> None:
        write_atomically(folder / "params.json", json.dumps(to_dict(Params(model=model, tokenizer=special)), indent=2))
        write_atomically(folder / "tokenizer.json", tokenizer.read_bytes())

    return write


def is_hf_folder(path: Path) -> bool:
    """Whether it is no checkpoint of ours and has a `config.json`."""
    return (path / "config.json").is_file() and not (path / "meta.json").is_file()


def open_model(path: Path, device: torch.device, precision: Precision) -> tuple[Any, Tokenizer, Special]:
    """A run, a checkpoint or a Hugging Face folder as (model in evaluation mode, tokenizer, its bos and eos ids).

    The parameters are held in the precision of the products: half the memory in bf16.
    Raises ConfigError when there is no model, or it is damaged.
    """
    if is_hf_folder(path):
        values = read_json(path / "config.json")
        model = _empty(hf.from_hf_config(values, str(path / "config.json")))
        hf.load_into(dict(model.named_parameters()), model.config, path)
        special: Special = {name: values.get(f"{name}_token_id") for name in ("bos", "eos")}
    else:
        checkpoint = find(path, whole=True)
        path, params = checkpoint.path, check(Params, checkpoint.params, f"{checkpoint.path}/params.json")
        model, special = _empty(params.model), params.tokenizer
        sharded.load(checkpoint, _named(model), num_ranks=1)
    model.compute_dtype = DTYPES[precision]
    model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.compute_dtype)
    return model.eval().requires_grad_(False), Tokenizer.load(path / "tokenizer.json"), special


def _empty(shape: ModelConfig) -> Any:
    """A model on the CPU whose parameters are waiting for their values; its buffers are set."""
    with torch.device("meta"):
        model = shape.build()
    model.to_empty(device="cpu")
    for module in owners(model):
        if not module._parameters:
            module.reset()
    return model


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder that gets its name when all went well, and is gone when not."""
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another folder or remove it")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export(source: Path, output: Path, precision: Precision = "fp32") -> None:
    """Write a run's newest checkpoint, or a checkpoint, as a Hugging Face folder that transformers loads as it is."""
    with _new_folder(output) as folder:
        model, tokenizer, special = open_model(find(source).path, ONE.device, "fp32")
        if not isinstance(model.config, LlamaConfig):
            raise ConfigError(f"{source}: models of kind {model.config.kind!r} have no Hugging Face counterpart")
        dtype = DTYPES[precision]
        hf.write_tensors(folder, hf.tensors_for(model.config, dict(model.named_parameters()), dtype))
        given = {name: ids for name, ids in special.items() if ids_of(special, name)}
        files = {
            "config.json": hf.to_hf_config(model.config, special, dtype),
            "generation_config.json": {f"{name}_token_id": ids for name, ids in given.items()},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.config.max_seq_len,
                "clean_up_tokenization_spaces": False,
                **{f"{name}_token": tokenizer.backend.id_to_token(ids_of(special, name)[0]) for name in given},
            },
        }
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2))
        (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")


def import_folder(source: Path, output: Path) -> None:
    """A Hugging Face folder as a run folder with one checkpoint, weights only, at step 0."""
    if not is_hf_folder(source):
        raise ConfigError(f"{source}: is not a Hugging Face folder (it has no config.json)")
    with _new_folder(output) as folder:
        model, _, special = open_model(source, ONE.device, "fp32")
        facts = {"samples": 0, "tokens": 0, "plan": None, "weights_only": True, "imported_from": source.name}
        beside = params_writer(model.config, special, source / "tokenizer.json")
        sharded.save(Store(folder / "checkpoints"), 0, _named(model), facts, beside, ONE)

"""Between our checkpoints, Hugging Face folders and plain torch files, and from the first two to a model that can speak."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import franca.models.hybrid  # noqa: F401 (with all families: they join the choice of models)
from franca.checkpoint import sharded
from franca.checkpoint.store import Checkpoint, Store, find, read_json
from franca.core.config import Precision, check, config, problems_error, to_dict
from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically
from franca.data.tokenizer import Tokenizer
from franca.models import hf, modeling
from franca.models.base import ModelConfig, owners
from franca.parallel.apply import DTYPES
from franca.parallel.world import World

ONE = World(0, 1, 0, torch.device("cpu"))
Format = Literal["hf", "torch"]
Special = dict[str, int | list[int] | None]  # `bos` and `eos`: an id, several of which each ends a text, or no such token


@config
class Params:
    """What `params.json` says: the model's shape, the special tokens of its data, modules outside of franca that define it."""

    model: ModelConfig
    tokenizer: Special
    modules: tuple[str, ...] = ()


def ids_of(special: Special, name: str) -> list[int]:
    """All ids of `bos` or `eos`, the usual one first."""
    value = special.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def params_writer(model: ModelConfig, special: Special, tokenizer: Path | bytes) -> Callable[[Path], None]:
    """What makes a checkpoint complete in itself: it writes the model's shape and the tokenizer beside the weights."""

    origins = {type(part).__module__ for part in (model, *getattr(model, "blocks", ()))}
    modules = tuple(sorted(name for name in origins if not name.startswith("franca.")))
    params = Params(model=model, tokenizer=special, modules=modules)

    def write(folder: Path) -> None:
        write_atomically(folder / "params.json", json.dumps(to_dict(params), indent=2))
        write_atomically(folder / "tokenizer.json", tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes())

    return write


def is_hf_folder(path: Path) -> bool:
    """Whether it is no checkpoint of ours and has a `config.json`."""
    return (path / "config.json").is_file() and not (path / "meta.json").is_file()


def open_model(path: Path, device: torch.device, precision: Precision) -> tuple[Any, Tokenizer, Special]:
    """A run, a checkpoint or a Hugging Face folder as (model in evaluation mode, tokenizer, its bos and eos ids).

    The parameters are held in the precision of the products: half the memory in bf16.
    Raises ConfigError when there is no model, or it is damaged.
    """
    dtype = DTYPES[precision]
    if is_hf_folder(path):
        model, special = _from_hf(path, dtype)
    else:
        checkpoint = find(path, whole=True)
        path, params = checkpoint.path, _params(checkpoint)
        model, special = _empty(params.model, dtype), params.tokenizer
        sharded.load(checkpoint, _named(model), num_ranks=1)
    model.compute_dtype = dtype
    return model.to(device).eval().requires_grad_(False), Tokenizer.load(path / "tokenizer.json"), special


def _from_hf(folder: Path, dtype: torch.dtype) -> tuple[Any, Special]:
    values = read_json(folder / "config.json")
    model = _empty(hf.from_hf_config(values, str(folder / "config.json")), dtype)
    own = values["model_type"] == modeling.MODEL_TYPE
    hf.load_into(dict(model.named_parameters()), model.config, folder, own)
    return model, {name: values.get(f"{name}_token_id") for name in ("bos", "eos")}


def _params(checkpoint: Checkpoint) -> Params:
    """What `params.json` says. It imports nothing: a checkpoint may come from anywhere."""
    if missing := [name for name in checkpoint.params.get("modules", ()) if name not in sys.modules]:
        given = " ".join(f"--imports {name}" for name in missing)
        raise ConfigError(f"{checkpoint.path}: its model is defined in {', '.join(missing)}. If you trust it, add: {given}")
    return check(Params, checkpoint.params, f"{checkpoint.path}/params.json")


def parameter_names(checkpoint: Checkpoint) -> list[str]:
    """The names of the model's parameters, in its own order."""
    return [name for name, _ in _on_meta(_params(checkpoint).model).named_parameters()]


def _on_meta(shape: ModelConfig) -> Any:
    with torch.device("meta"):
        return shape.build()


def _empty(shape: ModelConfig, dtype: torch.dtype) -> Any:
    """A model on the CPU whose parameters are waiting for their values, in `dtype`: all but decays and steps of time, which
    recurrences use in fp32. Its buffers are set.
    """
    model = _on_meta(shape)
    for name, parameter in model.named_parameters():
        if name.endswith((".weight", ".bias")):
            parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    for _, module in owners(model):
        if not module._parameters:
            module.reset()
    return model


def _named(model: torch.nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def _new(path: Path, folder: bool = True) -> Iterator[Path]:
    """A hidden folder, or file, that gets its name when all went well, and is gone when not."""
    if path.exists():
        raise ConfigError(f"{path}: exists already; choose another name or remove it")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial if folder else path.parent).mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.rename(path)
        sync_folder(path.parent)
    finally:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def export(source: Path, output: Path, precision: Precision = "fp32", form: Format = "hf", ema: bool = False) -> None:
    """Write a run's newest checkpoint, or a checkpoint, as a folder that transformers loads as it is, or as one torch file:
    `{"model": tensors by our names, "params": params.json, "tokenizer": tokenizer.json}`.

    `ema`: not the weights, but their average. The model is never built: a folder takes the memory of one of its files, a torch
    file that of the model.
    """
    checkpoint = find(source, whole=True)
    if ema and not checkpoint.meta.get("config", {}).get("optim", {}).get("ema"):
        raise ConfigError(f"{checkpoint.path}: holds no average of its weights; train with optim.ema, or leave out --ema")
    params, dtype, tokenizer = _params(checkpoint), DTYPES[precision], Tokenizer.load(checkpoint.path / "tokenizer.json")
    shapes = dict(_on_meta(params.model).named_parameters())

    def fetch(names: list[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shapes[name].shape, dtype=dtype) for name in names}
        stored = {f"optimizer.{name}.ema" if ema else f"model.{name}": tensor for name, tensor in tensors.items()}
        sharded.load(checkpoint, stored, num_ranks=1)
        return tensors

    if form == "torch":
        with _new(output, folder=False) as file:
            text = (checkpoint.path / "tokenizer.json").read_text(encoding="utf-8")
            torch.save({"model": fetch(list(shapes)), "params": checkpoint.params, "tokenizer": text}, file)
        return
    known = hf.family_of(params.model) is not None
    later = [name for name in shapes if known and name.startswith("future_heads.")]
    if later:
        warnings.warn(f"{source}: left out, as transformers predicts the next token alone: {', '.join(later)}", stacklevel=2)
    with _new(output) as folder:
        _write_facts(folder, params, tokenizer, dtype)
        hf.write_tensors(folder, params.model, {n: shapes[n] for n in shapes if n not in later}, fetch, dtype)


def _write_facts(folder: Path, params: Params, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """All files of a Hugging Face folder but the weights."""
    special = params.tokenizer
    given = {name: ids for name, ids in special.items() if ids_of(special, name)}
    files = {
        "config.json": hf.to_hf_config(params.model, special, dtype),
        "generation_config.json": {f"{name}_token_id": ids for name, ids in given.items()},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": params.model.max_seq_len,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokenizer.backend.id_to_token(ids_of(special, name)[0]) for name in given},
        },
    }
    code = modeling.sources(params.model) if hf.family_of(params.model) is None else {}
    for name, text in {**{name: json.dumps(values, indent=2) for name, values in files.items()}, **code}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")


def import_folder(source: Path, output: Path) -> None:
    """A Hugging Face folder, or a torch file of `export`, as a run folder with one checkpoint, weights only, at step 0."""
    if not source.is_file() and not is_hf_folder(source):
        raise ConfigError(f"{source}: is not a Hugging Face folder (it has no config.json), nor a file")
    with _new(output) as folder:
        if source.is_file():
            params, tensors, tokenizer = _from_torch(source)
        else:
            tokenizer = source / "tokenizer.json"
            Tokenizer.load(tokenizer)  # what is broken is refused
            model, special = _from_hf(source, torch.float32)
            params, tensors = Params(model=model.config, tokenizer=special), _named(model)
        facts = {"samples": 0, "tokens": 0, "plan": None, "weights_only": True, "imported_from": source.name}
        beside = params_writer(params.model, params.tokenizer, tokenizer)
        sharded.save(Store(folder / "checkpoints"), 0, tensors, facts, beside, ONE)


def _from_torch(file: Path) -> tuple[Params, dict[str, Tensor], Path | bytes]:
    """Plain values and tensors alone are unpickled; tensors in fp32 stay in the file until they are read."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        tensors, values, text = dict(held["model"]), dict(held["params"]), str(held["tokenizer"])
    except Exception as error:  # a broken pickle raises nearly anything; PyTorch's advice to trust it is not passed on
        raise ConfigError(f"{file}: is no file of `export --format torch` ({type(error).__name__})") from None
    params = check(Params, values, f"{file}: params")
    Tokenizer.parse(text, f"{file}: tokenizer")
    shapes = {name: parameter.shape for name, parameter in _on_meta(params.model).named_parameters()}
    problems = [f"{name} is not known" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            problems.append(f"{name} is missing, or holds no numbers of a model")
        elif tensor.shape != shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, params say {tuple(shape)}")
    if problems:
        raise problems_error(str(file), problems[:5])
    return params, {f"model.{name}": tensors[name].float() for name in shapes}, text.encode()

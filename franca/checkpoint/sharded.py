"""Tensors to a checkpoint folder and back, whole or sharded: `torch.distributed.checkpoint` files, resharded on load.

It is given named tensors and refuses to know what they mean. Nothing that a user could have downloaded is unpickled freely.
"""

import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from franca import __version__
from franca.checkpoint.store import Checkpoint, Store, sha256
from franca.core.config import Count, config
from franca.core.duration import Cadence, Duration
from franca.core.errors import ConfigError
from franca.parallel.world import World

T = TypeVar("T")

# Every class that the index of a checkpoint of plain tensors names; nothing else is ever constructed from one.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
    "ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch": "Size float32 float64 bfloat16 float16 int64 int32 uint8 bool strided int16",
    "torch._utils": "_get_layout",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath",
}


@config
class CheckpointConfig:
    """When a run is saved, and how much of it is kept. The last step and a stopped run are always saved."""

    every: Cadence = Duration(1000, "steps")  # any unit of the clock, also wall time: "20 min"
    keep: Count | None = 2  # newest ones; None: all


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # what Python 3.13 calls it, and no other
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in _ALLOWED.get(module, "").split():
            raise ConfigError(f"the checkpoint's index names {module}.{name}, which is no part of a checkpoint: not loaded")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Any:
    """The one use of getattr in an index: how the first releases of Python 3.11 pickle a member of an enumeration."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise ConfigError(f"the checkpoint's index asks for an attribute of {owner!r}: not loaded")
    return owner[name]


class Reader(FileSystemReader):
    """PyTorch's reader with the index unpickled by an allow-list."""

    def read_metadata(self, *args: Any, **keywords: Any) -> Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                metadata = _Unpickler(file).load()
        except ConfigError:
            raise
        except Exception as error:  # a broken pickle raises nearly anything
            raise ConfigError(f"{self.path}/.metadata: cannot be read ({error})") from None
        if not isinstance(metadata, Metadata):
            raise ConfigError(f"{self.path}/.metadata: holds a {type(metadata).__name__}, no checkpoint index")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def save(
    store: Store, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], beside: Callable[[Path], None], world: World
) -> Checkpoint:
    """Write and commit the checkpoint of `step`. Every rank calls it with its part of the same tensors.

    `facts` go into `meta.json`; `beside(folder)` adds files (the model's `params.json`, the tokenizer), on rank 0.

    Raises OSError on every rank alike, when any rank could not write; the checkpoints before it are untouched.
    """
    begin = time.time()
    _together(world, lambda: store.begin(step) if world.is_main else None)
    partial = store.partial(step)

    def write() -> dict[str, dict[str, Any]]:
        writer = FileSystemWriter(partial, single_file_per_rank=True, thread_count=1)
        with _alone():
            dcp_save(tensors, storage_writer=writer, no_dist=world.size == 1)
        if world.is_main:
            beside(partial)
        mine = [*partial.glob(f"__{world.rank}_*"), *(partial.glob("[!_]*") if world.is_main else ())]
        return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in mine}

    files = {name: known for part in _together(world, write) for name, known in part.items()}
    meta = {
        **facts,
        "world_size": world.size,
        "files": dict(sorted(files.items())),
        "versions": {"franca": __version__, "torch": torch.__version__},
        "seconds": time.time() - begin,
        "time": time.time(),
    }
    _together(world, lambda: store.commit(step, meta) if world.is_main else None)
    return Checkpoint(store.folder(step))


def _together(world: World, act: Callable[[], T]) -> list[T]:
    """Let every rank act; when one fails, all raise. The results of all ranks."""
    result, error = None, None
    try:
        result = act()
    except CheckpointException as caught:  # PyTorch's, which is no Exception; alike on all ranks
        error = _causes(caught)
    except Exception as caught:  # told to the other ranks, which would wait for this one for ever
        error = f"rank {world.rank}: {type(caught).__name__}: {caught}"
    results, errors = zip(*world.gather_objects((result, error)), strict=True)
    if any(errors):
        raise OSError(f"the checkpoint could not be written: {'; '.join(dict.fromkeys(filter(None, errors)))}")
    return list(results)


def _causes(error: CheckpointException) -> str:
    """What went wrong on each rank; PyTorch's advice to unpickle freely is not passed on."""
    texts = []
    for rank, (cause, _) in error.failures.items():
        unpickled = isinstance(cause, pickle.UnpicklingError)
        text = "holds what is no tensor: not loaded" if unpickled else f"{type(cause).__name__}: {cause}"
        texts.append(f"rank {rank}: {text}")
    return "; ".join(texts)


def newest_good(store: Store, world: World) -> tuple[Checkpoint | None, dict[int, list[str]]]:
    """The newest checkpoint whose files are all as they were written, and the damage of the newer ones by their steps.

    Every rank checks some of the files, and all agree.
    """
    damaged: dict[int, list[str]] = {}
    for step in world.from_main([checkpoint.step for checkpoint in reversed(store.committed())]):
        checkpoint = Checkpoint(store.folder(step))
        damage = [text for found in world.gather_objects(checkpoint.damage(world.rank, world.size)) for text in found]
        if not damage:
            return checkpoint, damaged
        damaged[step] = damage
    return None, damaged


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], num_ranks: int) -> None:
    """Fill `tensors`, whole or sharded in any way, in place. Raises ConfigError when names or shapes differ, or for damage."""
    reader = Reader(checkpoint.path)
    index = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"{name} is not in it" for name in here if name not in stored]
    problems += [
        f"{name} is {stored[name]} there and {here[name]} here" for name in here if stored.get(name, here[name]) != here[name]
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        advice = "Use the model: and optim: sections it was made with."
        raise ConfigError(f"{checkpoint.path}: is a checkpoint of another model: {shown}. {advice}")
    with _alone():
        try:
            dcp_load(tensors, storage_reader=reader, no_dist=num_ranks == 1)
        except CheckpointException as error:
            raise ConfigError(f"{checkpoint.path}: is damaged: {_causes(error)}") from None


@contextmanager
def _alone() -> Iterator[None]:
    """One process without a process group is what is meant; PyTorch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield

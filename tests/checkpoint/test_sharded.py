"""Tensors to files and back in one process: bit for bit, one error for what does not fit, nothing unpickled freely."""

import io
import os
import pickle
import resource
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, Store
from franca.core.errors import ConfigError
from franca.models.llama import LlamaConfig


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(5, 3, generator=generator),
        "model.b": torch.randn(7, generator=generator),
        "half": torch.randn(4, 4, generator=generator).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64, generator=generator),
        "count": torch.tensor(2**40 + 1),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "odd": torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.float32).tiny / 4]),
        "transposed": torch.randn(3, 6, generator=generator).T,
    }


def save(store: Store, step: int, tensors: dict[str, Tensor]) -> Checkpoint:
    def beside(folder: Path) -> None:
        (folder / "params.json").write_text("{}")

    return sharded.save(store, step, tensors, {"samples": step}, beside, convert.ONE)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


@pytest.fixture
def checkpoint(store: Store) -> Checkpoint:
    return save(store, 1, some_tensors())


# --- there and back


def test_tensors_come_back_bit_for_bit(checkpoint: Checkpoint) -> None:
    expected = some_tensors()
    given = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    sharded.load(checkpoint, given, num_ranks=1)
    for name, tensor in expected.items():
        assert given[name].dtype == tensor.dtype
        assert given[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8)), name


def test_a_part_of_the_tensors_may_be_asked_for(checkpoint: Checkpoint) -> None:
    given = {"model.b": torch.zeros(7)}
    sharded.load(checkpoint, given, num_ranks=1)
    assert torch.equal(given["model.b"], some_tensors()["model.b"])


def test_meta_says_what_was_written(checkpoint: Checkpoint) -> None:
    assert set(checkpoint.meta["files"]) == {".metadata", "__0_0.distcp", "params.json"}
    assert {path.name for path in checkpoint.path.iterdir()} == set(checkpoint.meta["files"]) | {"meta.json"}
    assert (checkpoint.meta["samples"], checkpoint.meta["world_size"]) == (1, 1)
    assert checkpoint.meta["versions"]["torch"] == torch.__version__


def test_a_write_that_fails_leaves_the_checkpoints_before_it(store: Store, checkpoint: Checkpoint) -> None:
    def fail(folder: Path) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match=r"could not be written: rank 0: OSError: no space left"):
        sharded.save(store, 2, some_tensors(), {}, fail, convert.ONE)
    assert [found.step for found in store.committed()] == [1]
    assert checkpoint.damage() == []
    assert save(store, 2, some_tensors()).damage() == []


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The system refuses to let a file grow beyond 2 KB: the nearest thing to a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
def test_a_full_disk_is_an_os_error_and_leaves_the_checkpoints_before_it(store: Store) -> None:
    with pytest.raises(OSError, match="could not be written: rank 0: "):
        save(store, 2, {"x": torch.zeros(10_000)})
    assert store.committed() == []


# --- what does not fit


def test_everything_that_does_not_fit_is_in_one_error(checkpoint: Checkpoint) -> None:
    given = {"model.a": torch.zeros(3, 5), "model.b": torch.zeros(7), "model.c": torch.zeros(1), "count": torch.zeros(2)}
    with pytest.raises(ConfigError) as caught:
        sharded.load(checkpoint, given, num_ranks=1)
    message = str(caught.value)
    assert message.startswith(f"{checkpoint.path}: is a checkpoint of another model: ")
    for words in ("model.c is not in it", "model.a is (5, 3) there and (3, 5) here", "count is () there and (2,) here"):
        assert words in message
    assert "model.b" not in message
    assert all(torch.count_nonzero(tensor) == 0 for tensor in given.values())  # nothing was filled in


def test_a_long_list_is_cut(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"new\.4 is not in it and 6 more"):
        sharded.load(checkpoint, {f"new.{n}": torch.zeros(1) for n in range(11)}, num_ranks=1)


def test_a_model_of_another_shape_lists_its_tensors(
    tmp_path: Path, make_checkpoint: Callable[..., Checkpoint], tokenizer: Any
) -> None:
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_seq_len=8)
    made = make_checkpoint(tmp_path / "run", config)
    other = LlamaConfig(vocab_size=tokenizer.vocab_size, dim=16, num_layers=2, num_heads=2, mlp_dim=32, max_seq_len=8)
    tensors = {f"model.{name}": p.detach() for name, p in other.build().named_parameters()}
    with pytest.raises(ConfigError) as caught:
        sharded.load(made, tensors, num_ranks=1)
    assert "model.layers.1.attention_norm.weight is not in it" in str(caught.value)
    assert "model: and optim: sections" in str(caught.value)


def test_a_truncated_file_of_tensors_is_one_error(checkpoint: Checkpoint) -> None:
    """When nobody has looked for damage first, as when a model is opened to speak."""
    file = checkpoint.path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="is damaged: rank 0: "):
        sharded.load(checkpoint, some_tensors(), num_ranks=1)


# --- nothing is unpickled freely


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def hostile(trap: Path) -> dict[str, Call]:
    return {
        "posix.system": Call(os.system, f"touch {trap}"),
        "builtins.eval": Call(eval, f"open({str(trap)!r}, 'w')"),
        "pathlib.Path.touch": Call(Path.touch, PosixPath(trap)),
        "builtins.getattr": Call(getattr, Call(os.system, f"touch {trap}"), "x"),
    }


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "pathlib.Path.touch", "builtins.getattr"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_hostile_index_is_refused_and_does_nothing(checkpoint: Checkpoint, tmp_path: Path, name: str, protocol: int) -> None:
    trap = tmp_path / "sprung"
    attack = pickle.dumps(hostile(trap)[name], protocol=protocol)
    (checkpoint.path / ".metadata").write_bytes(attack)
    with pytest.raises(ConfigError, match=r"names \w+\.[\w.]+, which is no part of a checkpoint: not loaded"):
        sharded.load(checkpoint, some_tensors(), num_ranks=1)
    assert not trap.exists()


def test_the_attack_above_would_have_worked(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickle.loads(pickle.dumps(hostile(trap)["posix.system"]))
    assert trap.exists()


def test_an_attack_hidden_in_a_true_index_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trap, file = tmp_path / "sprung", checkpoint.path / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.planner_data = Call(os.system, f"touch {trap}")
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(ConfigError, match="which is no part of a checkpoint"):
        sharded.load(checkpoint, some_tensors(), num_ranks=1)
    assert not trap.exists()


def test_a_pickle_in_the_place_of_a_tensor_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trap, file = tmp_path / "sprung", checkpoint.path / "__0_0.distcp"
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {trap}"), buffer)
    file.write_bytes(buffer.getvalue() * (1 + file.stat().st_size // len(buffer.getvalue())))
    index_file = checkpoint.path / ".metadata"
    index = pickle.loads(index_file.read_bytes())
    for place in index.storage_data.values():
        place.offset, place.length = 0, len(buffer.getvalue())
    index_file.write_bytes(pickle.dumps(index))
    with pytest.raises(ConfigError, match=r"is damaged: rank 0: holds what is no tensor: not loaded$"):
        sharded.load(checkpoint, {"model.b": torch.zeros(7)}, num_ranks=1)
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_an_index_that_is_none_is_one_error(checkpoint: Checkpoint, content: bytes) -> None:
    (checkpoint.path / ".metadata").write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.metadata: "):
        sharded.load(checkpoint, some_tensors(), num_ranks=1)


def test_a_missing_index_is_one_error(checkpoint: Checkpoint) -> None:
    (checkpoint.path / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"\.metadata: cannot be read"):
        sharded.load(checkpoint, some_tensors(), num_ranks=1)


def test_a_broken_index_is_read_or_is_one_error(checkpoint: Checkpoint) -> None:
    """Whatever byte is wrong: never another exception, which a user would see as a traceback."""
    file = checkpoint.path / ".metadata"
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert isinstance(sharded.Reader(checkpoint.path).read_metadata(), Metadata)
        except ConfigError:
            refused += 1
    assert refused > len(whole) / 12


def test_an_index_written_by_python_3_13_is_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """There `pathlib`'s classes say that they live in `pathlib._local`, a module that other versions lack."""

    class Moved:
        def __reduce__(self) -> Any:
            return self.__class__, ("there",)

    Moved.__module__, Moved.__qualname__, Moved.__name__ = "pathlib._local", "PosixPath", "PosixPath"
    module = types.ModuleType("pathlib._local")
    module.PosixPath = Moved  # type: ignore[attr-defined]
    file = checkpoint.path / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.storage_meta.checkpoint_id = Moved()
    Moved.__init__ = lambda self, *parts: None  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", module)
        content = pickle.dumps(index)
    assert b"pathlib._local" in content
    file.write_bytes(content)
    given = {"model.b": torch.zeros(7)}
    sharded.load(checkpoint, given, num_ranks=1)
    assert torch.equal(given["model.b"], some_tensors()["model.b"])


# --- damage


FILES = [".metadata", "__0_0.distcp", "params.json", "tokenizer.json", "meta.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Checkpoint], tokenizer: Any) -> Checkpoint:
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, dim=16, num_layers=1, num_heads=2, mlp_dim=24, max_seq_len=8)
    return make_checkpoint(tmp_path_factory.mktemp("whole") / "run", config)


@pytest.fixture
def copy(whole: Checkpoint, tmp_path: Path) -> Checkpoint:
    shutil.copytree(whole.path, tmp_path / whole.path.name)
    return Checkpoint(tmp_path / whole.path.name)


def test_these_are_all_files_of_a_checkpoint(whole: Checkpoint) -> None:
    assert sorted(path.name for path in whole.path.iterdir()) == sorted(FILES)
    assert whole.damage() == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_flipped_bit_in_any_file_is_found(copy: Checkpoint, name: str, share: float) -> None:
    file = copy.path / name
    content = bytearray(file.read_bytes())
    content[int(share * len(content))] ^= 1
    file.write_bytes(content)
    assert len(copy.damage()) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_file_is_found(copy: Checkpoint, name: str, keep: int) -> None:
    file = copy.path / name
    file.write_bytes(file.read_bytes()[:keep])
    [text] = copy.damage()
    assert name in text


@pytest.mark.parametrize("name", FILES)
def test_a_removed_file_is_found(copy: Checkpoint, name: str) -> None:
    (copy.path / name).unlink()
    [text] = copy.damage()
    assert name in text


# --- the newest good one


def three(store: Store) -> None:
    for step in (1, 2, 3):
        save(store, step, {"x": torch.full((4,), float(step))})


def test_the_newest_good_one_is_the_newest(store: Store) -> None:
    three(store)
    found, damaged = sharded.newest_good(store, convert.ONE)
    assert found is not None
    assert (found.step, damaged) == (3, {})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "params.json", "meta.json"])
def test_a_damaged_one_is_told_of_and_the_one_before_it_taken(store: Store, name: str) -> None:
    three(store)
    file = store.folder(3) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found, damaged = sharded.newest_good(store, convert.ONE)
    assert found is not None
    values = {"x": torch.zeros(4)}
    sharded.load(found, values, num_ranks=1)
    assert torch.equal(values["x"], torch.full((4,), 2.0))
    assert list(damaged) == [3]
    assert len(damaged[3]) == 1
    assert name in damaged[3][0]


def test_when_all_are_damaged_there_is_none(store: Store) -> None:
    three(store)
    for step in (1, 2, 3):
        (store.folder(step) / "params.json").unlink()
    found, damaged = sharded.newest_good(store, convert.ONE)
    assert found is None
    assert list(damaged) == [3, 2, 1]


def test_without_checkpoints_there_is_none(store: Store) -> None:
    assert sharded.newest_good(store, convert.ONE) == (None, {})


class EarlyPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do: getattr(class, name)."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_an_index_written_by_an_early_python_3_11_is_read(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / ".metadata"
    index = sharded.Reader(checkpoint.path).read_metadata()
    with open(path, "wb") as file:
        EarlyPickler(file).dump(index)
    assert b"getattr" in path.read_bytes()
    assert sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata == index.state_dict_metadata


def test_getattr_serves_nothing_else(checkpoint: Checkpoint) -> None:
    class Reach:
        def __reduce__(self) -> Any:
            return getattr, (Path, "cwd")

    (checkpoint.path / ".metadata").write_bytes(pickle.dumps(Reach()))
    with pytest.raises(ConfigError, match=r"attribute of .*Path"):
        sharded.Reader(checkpoint.path).read_metadata()

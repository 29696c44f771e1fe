"""Recomputation: the same numbers to the bit, in less memory, for every family, whatever is kept."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from franca.core.config import check
from franca.core.errors import ConfigError
from franca.models.base import Batch
from franca.models.gpt2 import GPT2Config
from franca.models.hawk import HawkConfig
from franca.models.hybrid import HybridConfig
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig
from franca.models.minrnn import MinGRUConfig
from franca.parallel import mesh
from franca.parallel.apply import parallelize
from franca.parallel.mesh import ParallelConfig
from franca.train.config import read_config, resolve

SHARED = {"vocab_size": 61, "dim": 32, "num_layers": 4, "max_seq_len": 64}
LLAMA = LlamaConfig(num_heads=4, num_kv_heads=2, mlp_dim=96, **SHARED)
HAWK = HawkConfig(kind="hawk", mlp_dim=64, **SHARED)
MAMBA = MambaConfig(kind="mamba", head_dim=16, state_dim=8, **SHARED)
FAMILIES: dict[str, Any] = {
    "llama": LLAMA,
    "gpt2": GPT2Config(num_heads=4, dropout=0.3, **SHARED),
    "mingru": MinGRUConfig(kind="mingru", **SHARED),
    "hawk": HAWK,
    "mamba": MAMBA,
    "hybrid": HybridConfig(kind="hybrid", blocks=(HAWK, dataclasses.replace(LLAMA, window=9), MAMBA), **SHARED),
}
KINDS: dict[str, dict[str, Any]] = {
    "every": {"kind": "every", "n": 2},
    "full": {"kind": "full"},
    "selective": {"kind": "selective"},
    "half of the products": {"kind": "selective", "every_second_product": True},
}
CPU = torch.device("cpu")


class Alive(TorchDispatchMode):
    """What was allocated inside and is still there: its bytes, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        return out

    def bytes(self) -> int:
        return sum(storage.nbytes() for ref in self.storages.values() if (storage := ref()) is not None)


def build(shape: Any, recompute: dict[str, Any], compiled: bool = False) -> Any:
    with torch.device("meta"):
        model = shape.build()
    parallel = check(ParallelConfig, {"recompute": recompute, "compile": compiled}, "test")
    assert mesh.problems(parallel, 1, shape, 64) == []
    parallelize(model, mesh.ALONE, parallel, "fp32", CPU, seed=1)
    return model


def batch() -> Batch:
    ids = torch.randint(61, (3, 65), generator=torch.Generator().manual_seed(2))
    document = (torch.arange(64) // 40).expand(3, 64)
    return Batch(ids[:, :-1], ids[:, 1:], document)


def measure(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and what the forward pass left in memory."""
    torch.manual_seed(3)
    with Alive() as alive:
        loss = model.losses(batch())["nll"]
        kept = alive.bytes()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, kept


@pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
def test_the_same_bits_in_less_memory(shape: Any) -> None:
    """Also where dropout draws; names are those of the plain model."""
    loss, grads, most = measure(build(shape, {"kind": "none"}))
    kept = {}
    for name, recompute in KINDS.items():
        other, others, kept[name] = measure(build(shape, recompute))
        assert torch.equal(other, loss), name
        assert list(others) == list(grads)
        assert all(torch.equal(others[key], grads[key]) for key in grads), name
    assert kept["full"] < 0.4 * most
    assert kept["full"] < kept["half of the products"] < kept["selective"] < 0.95 * most
    assert kept["full"] < kept["every"] < 0.8 * most


def test_every_second_product_runs_again_and_no_kept_one() -> None:
    counts = {}
    for name in ("none", "selective", "half of the products", "full"):
        model = build(LLAMA, KINDS.get(name, {"kind": name}))
        loss = model.losses(batch())["nll"]
        with Products() as products:
            loss.backward()
        counts[name] = products.count
    extra = {name: count - counts["none"] for name, count in counts.items()}
    assert extra["selective"] == 0
    assert extra["half of the products"] == 4 * 3  # a block has 7: the second, fourth and sixth
    assert extra["full"] == 4 * 6  # the last is no part of what its own gradient needs


class Products(TorchDispatchMode):
    """Counts products of two matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_wrapped_without_gradients() -> None:
    """Validation and decoding with a cache are the plain model's."""
    plain, model = build(LLAMA, {"kind": "none"}), build(LLAMA, {"kind": "full"})
    tokens = batch().tokens_BT
    with torch.no_grad():
        cache = model.new_cache(3, 64)
        parts = [model(part, cache=cache) for part in tokens.split([30, 1, 33], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), plain(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_two_ranks_compute_what_one_does_without(launch, run_file, records, kind: str) -> None:
    found = []
    for name, ranks, recompute in (("plain", 1, {"kind": "none"}), ("again", 2, {"kind": kind})):
        sections = {"train": {"length": "4 steps", "precision": "fp32", "micro_samples": 2}, "optim": {"warmup": "1 steps"}}
        run = launch(run_file(name, **sections, parallel={"recompute": recompute}), ranks=ranks)
        assert run.wait() == [0] * ranks
        found.append(records(run.folder))
    for key, rel in (("loss", 2e-6), ("grad_norm", 1e-4)):
        assert [r[key] for r in found[1]] == pytest.approx([r[key] for r in found[0]], rel=rel)


def test_what_has_no_effect_is_refused(run_file) -> None:
    for words, complaint in (
        (["parallel.recompute.kind=budget"], "set parallel.compile, or use kind selective"),
        (["parallel.compile_cache=none"], "nothing is compiled; set parallel.compile"),
        (["parallel.recompute.kind=full", "parallel.recompute.n=2"], "unknown key"),
        (["parallel.recompute.kind=all"], "'all' is not one of budget, every, full, none, selective"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            resolve(read_config(run_file(), words), 1)

"""Pipelines: the same losses and gradients as one process, whatever the layout and the schedule."""

import multiprocessing
import os
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from franca.models.base import IGNORE, Batch
from franca.models.gpt2 import GPT2Config
from franca.models.hawk import HawkConfig
from franca.models.llama import LlamaConfig
from franca.parallel import pipeline
from franca.parallel.apply import init_weights, reshard
from franca.parallel.pipeline import Pipeline

SHAPE = {"vocab_size": 61, "vocab_multiple": 4, "dim": 32, "max_seq_len": 32}
LENGTH = 16


@dataclass(frozen=True)
class Case:
    """One pipeline: a model, how it is laid out, and steps of (rows of all replicas, rows of a micro-batch)."""

    config: Any
    stages: tuple[int, ...] | None = None
    interleave: int = 1
    dp_shard: int = 1
    reshard_after_forward: bool = True
    documents: bool = True
    dtype: torch.dtype = torch.float32
    steps: tuple[tuple[int, int], ...] = ((7, 2),)


def rows(count: int, seed: int, documents: bool) -> Batch:
    """Random rows, with targets that are not trained on and documents that begin in the middle."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SHAPE["vocab_size"], (count, LENGTH + 1), generator=draw)
    targets = tokens[:, 1:].masked_fill(torch.rand(count, LENGTH, generator=draw) < 0.2, IGNORE)
    if not documents:
        return Batch(tokens[:, :-1], targets)
    begins = (torch.rand(count, LENGTH, generator=draw) < 0.2).index_fill(1, torch.tensor([0]), True)
    places = torch.arange(LENGTH).expand(count, -1)
    return Batch(tokens[:, :-1], targets, begins.cumsum(1), places - places.where(begins, 0).cummax(1).values)


def whole(case: Case) -> Any:
    model = case.config.build()
    model.compute_dtype = case.dtype
    init_weights(model, torch.Generator().manual_seed(5))
    return model


def chunk(case: Case, layers: range, mesh: Any) -> Any:
    """A part of the model, sharded as `parallel.apply` shards a model, with the weights of the whole one."""
    model = whole(case)
    pipeline.cut(model, layers)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=case.reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=case.reshard_after_forward)
        for method in ("losses", "hidden"):
            register_fsdp_forward_method(model, method)
        for name, p in model.named_parameters():
            p.to_local().detach().copy_(distribute_tensor(weights[name], p.device_mesh, p.placements).to_local())
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(case: Case, batch: Batch, scale: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms and gradients of one process, all rows at once."""
    model = whole(case)
    losses = model.losses(batch)
    (sum(losses.values()) * scale).backward()
    return {name: value.item() for name, value in losses.items()}, {n: p.grad for n, p in model.named_parameters()}


def check(case: Case) -> None:
    """On every rank: the terms, each gradient held here, the norm of all, and the held-out loss."""
    pp = dist.get_world_size() // case.dp_shard
    mesh = init_device_mesh("cpu", (pp, case.dp_shard), mesh_dim_names=("pp", "dp_shard"))
    costs = whole(case).layer_flops(LENGTH)
    layout = pipeline.split(costs, costs[0], pp * case.interleave, case.stages)
    mine = layout[mesh.get_local_rank("pp") :: pp]
    shards = mesh["dp_shard"] if case.dp_shard > 1 else None
    model = Pipeline([chunk(case, layers, shards) for layers in mine], mesh.get_group("pp"), torch.device("cpu"), LENGTH)
    for number, (count, micro) in enumerate(case.steps):
        batch, replica = rows(count, number, case.documents), mesh.get_local_rank("dp_shard")
        scale = 1 / int((batch.targets_BT != IGNORE).sum())
        terms, grads = reference(case, batch, scale)
        part = Batch(*(None if t is None else t[replica :: case.dp_shard] for t in batch))
        seen: list[tuple[int, int]] = []
        sums = model.step(part, micro, torch.tensor(scale * case.dp_shard), lambda *place, seen=seen: seen.append(place))
        rel = 1e-5 if case.dtype == torch.float32 else 1e-2
        same_terms(sums, terms, rel)
        same_gradients(model, grads, rel)
        assert len(seen) == len(set(seen)), "every micro-batch goes through every stage once"
        assert {first for first, _ in seen} >= set(range(0, len(part.tokens_BT), micro))
        for held_out in (model.losses(part), model.losses(part)):
            same_terms(held_out, terms, rel)
        reshard(model)
        for parameter in model.parameters():
            parameter.grad = None


def same_terms(sums: dict[str, torch.Tensor], terms: dict[str, float], rel: float) -> None:
    assert list(sums) == list(terms)
    total = torch.stack([value.detach() for value in sums.values()])
    dist.all_reduce(total)
    assert total.tolist() == pytest.approx(list(terms.values()), rel=rel)


def same_gradients(model: Pipeline, grads: dict[str, torch.Tensor], rel: float) -> None:
    for name, parameter in model.named_parameters():
        error, size = (full(parameter.grad) - grads[name]).norm().item(), grads[name].norm().item()
        assert error <= rel * size, f"{name}: the gradient is off by {error}, and {size} long"
    squares = sum(full(p.grad).double().square().sum() for p in model.counted_parameters())
    dist.all_reduce(squares, group=model.group)
    wanted = sum(grad.double().square().sum() for grad in grads.values())
    assert squares.sqrt().item() == pytest.approx(wanted.sqrt().item(), rel=rel)


def test_the_balanced_layout_has_the_fastest_slowest_stage() -> None:
    """Against all layouts there are."""
    seed = random.Random(3)
    for _ in range(30):
        costs, stages = [seed.choice((1.0, 2.0, 2.5)) for _ in range(seed.randint(4, 8))], seed.randint(1, 4)
        head = seed.choice((0.0, 1.5, 4.0))

        def slowest(ends: tuple[int, ...], costs: list[float] = costs, head: float = head) -> float:
            return max(sum(costs[a:b]) + head * (b == len(costs)) for a, b in pairwise((0, *ends)))

        layout = pipeline.split(costs, head, stages)
        assert [layers.start for layers in layout] == [0, *(layers.stop for layers in layout[:-1])]
        choices = [(*ends, len(costs)) for ends in combinations(range(1, len(costs)), stages - 1)]
        assert slowest(tuple(layers.stop for layers in layout)) == min(map(slowest, choices)), (costs, head, stages)


def test_layouts_even_explicit_and_refused() -> None:
    def lengths(*args: Any) -> list[int]:
        return [len(layers) for layers in pipeline.split(*args)]

    assert lengths([1.0] * 8, 0.0, 4) == [2, 2, 2, 2]
    assert lengths([1.0] * 14, 1.0, 4) == [3, 4, 4, 3], "the first stage has the most activations to keep"
    assert lengths([1.0] * 12, 2.0, 4, (3, 4, 4, 1)) == [3, 4, 4, 1]
    model: Any = whole(Case(llama(5, tied=True)))
    assert sum(model.layer_flops(LENGTH)) + model.head_flops == model.flops_per_token(LENGTH)
    for stages in ((3, 4, 4), (3, 4, 4, 2), (0, 4, 4, 4)):
        assert pipeline.problems(12, 4, stages) == [
            f"parallel.stages: is {list(stages)}; give 4 numbers (pp x interleave) of at least 1 "
            "that add up to the 12 layers, or leave it out"
        ]
    assert pipeline.problems(12, 4, (3, 4, 4, 1)) == pipeline.problems(12, 12, None) == []
    assert len(pipeline.problems(12, 16, None)) == 1


def rank(number: int, ranks: int, folder: Path, task: Callable[[Any], None], items: list[Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=ranks)
    for item in items:
        try:
            task(item)
        except BaseException:
            (folder / f"rank{number}").write_text(f"{item}\n{traceback.format_exc()}")
            os._exit(1)  # without a word to the others: they are killed
    dist.destroy_process_group()


def spawn(ranks: int, folder: Path, cases: list[Case]) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=rank, args=(number, ranks, folder, check, cases)) for number in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.exitcode != 0:
            for other in processes:
                other.kill()
    told = [path.read_text() for path in sorted(folder.glob("rank*"))]
    assert [process.exitcode for process in processes] == [0] * ranks, "\n".join(told)


def llama(layers: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(num_layers=layers, num_heads=4, num_kv_heads=2, mlp_dim=64, **SHAPE, **options)


def gpt2(layers: int, **options: Any) -> GPT2Config:
    return GPT2Config(num_layers=layers, num_heads=4, dropout=0.0, **SHAPE, **options)


def test_two_stages_equal_one_process(tmp_path: Path) -> None:
    """Uneven last micro-batches, batches that grow, two heads, tied embeddings, and chunks that take turns."""
    hawk = HawkConfig(kind="hawk", num_layers=5, mlp_dim=64, width_multiple=16, **SHAPE)
    cases = [
        Case(llama(4, future_tokens=2, z_loss=1e-2), steps=((7, 2), (7, 2), (9, 2), (1, 1))),
        Case(gpt2(5), stages=(2, 3), steps=((5, 1), (4, 4))),
        Case(hawk, stages=(4, 1)),
        Case(gpt2(4), interleave=2, documents=False, steps=((5, 1), (8, 2))),
        Case(llama(6, window=5, qk_norm=True), stages=(1, 2, 2, 1), interleave=2, steps=((7, 2), (3, 2))),
        Case(hawk, interleave=2),
        Case(llama(4), dtype=torch.bfloat16),
    ]
    spawn(2, tmp_path, cases)


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    """Four stages, and two stages of which FSDP2 cuts each in two."""
    cases = [
        Case(gpt2(6), steps=((6, 1), (5, 2))),
        Case(llama(4, tied=True), dp_shard=2, steps=((14, 2), (8, 2))),
        Case(gpt2(4), dp_shard=2, reshard_after_forward=False, steps=((14, 2), (16, 2))),
        Case(llama(5), dp_shard=2, interleave=2, steps=((14, 2), (16, 2))),
        Case(gpt2(4), dp_shard=2, interleave=2, reshard_after_forward=False),
    ]
    spawn(4, tmp_path, cases)

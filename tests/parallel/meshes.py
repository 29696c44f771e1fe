"""Real runs of `franca train` on many meshes, in processes that are forked: a start costs no imports.

`python tests/parallel/meshes.py FOLDER [FAMILY ...]`: every valid mesh of up to 8 ranks, as the table of docs/parallelism.md.
"""

import itertools
import math
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
TRUNK = {"dim": 32, "num_layers": 4, "max_seq_len": 64}
HEADS = {"num_heads": 8, "num_kv_heads": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama", **HEADS},
    "qwen": {"kind": "llama", "qk_norm": True, "qkv_bias": True, "tied": True, "window": 12, "z_loss": 1e-3, **HEADS},
    "gpt2": {"kind": "gpt2", "num_heads": 8, "dropout": 0.0},
    "mingru": {"kind": "mingru"},
    "minlstm": {"kind": "minlstm"},
    "hawk": {"kind": "hawk"},
    "mamba": {"kind": "mamba", "head_dim": 16, "state_dim": 8},
    "hybrid": {"kind": "hybrid", "blocks": ["hawk", {"kind": "llama", **HEADS}]},
}


def write(path: Path, dataset: Path, family: str, parallel: dict[str, Any], precision: str = "fp32") -> Path:
    """A run of 5 steps with accumulation, rows that divide by no mesh, documents that do not see each other, a held-out set."""
    values = {
        "run": str(path.parent / path.stem),
        "model": TRUNK | FAMILIES[family],
        "data": {"sources": [{"path": str(dataset)}], "seq_len": 64, "attention": "document"},
        "train": {"length": "5 steps", "batch_samples": 11, "micro_samples": 3, "precision": precision, "log_every": "1 steps"},
        "optim": {"lr": 1e-3, "warmup": "1 steps"},
        "checkpoint": {"every": "100 steps"},
        "validation": {"at_end": True, "micro_samples": 16},
        "parallel": parallel,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def train(path: Path, ranks: int, timeout_s: float = 300.0) -> dict[str, list[float]]:
    """Train a run file on so many ranks; its losses, gradient norms and held-out losses.

    Raises AssertionError with what the failed ranks have written.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(path, rank, ranks, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        process.kill()
    if failed := [rank for rank, process in enumerate(processes) if process.exitcode != 0]:
        told = [path.with_suffix(f".{rank}.out").read_text() for rank in failed]
        first = min(told, key=lambda text: "Connection closed by peer" in text)
        raise AssertionError(f"{path.stem}: ranks {failed} failed\n{first[-4000:]}")
    return found(path.parent / path.stem)


def _work(path: Path, rank: int, ranks: int, port: int) -> None:
    sys.stdout = sys.stderr = open(path.with_suffix(f".{rank}.out"), "a", buffering=1)  # noqa: SIM115 (the process's)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    from franca.train import loop

    assert loop.main(path, []) == 0


def found(folder: Path) -> dict[str, list[float]]:
    from franca.core.run import current_metrics

    steps, held_out = (list(current_metrics(folder / f"metrics{name}.jsonl")) for name in ("", ".validation"))
    return {
        "loss": [record["loss"] for record in steps],
        "grad_norm": [record["grad_norm"] for record in steps],
        "held-out loss": [record["loss"] for record in held_out],
    }


def differences(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """The largest relative difference of each series."""
    return {name: max(abs(b / a - 1) for a, b in zip(one[name], other[name], strict=True)) for name in one}


def every_mesh(family: str, most: int = 8) -> Iterator[dict[str, int]]:
    """All meshes of 2 to `most` ranks that franca does not refuse for a family, the small ones first."""
    from franca.core.config import check
    from franca.models import hybrid
    from franca.models.base import ModelConfig
    from franca.parallel.mesh import ParallelConfig, problems

    del hybrid  # with it, all families are known
    values = TRUNK | FAMILIES[family] | {"vocab_size": 512}
    model = check(ModelConfig, values, "model")
    shapes = itertools.product(range(1, most + 1), repeat=len(AXES))
    for shape in sorted((s for s in shapes if 1 < math.prod(s) <= most), key=lambda s: (math.prod(s), s)):
        sizes = dict(zip(AXES, shape, strict=True))
        if not problems(check(ParallelConfig, sizes, "parallel"), math.prod(shape), model, 64):
            yield sizes


def name_of(sizes: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)


def main(root: Path, families: list[str]) -> None:
    import torch

    import franca.train.loop  # noqa: F401 (here, not in every fork)
    from franca.data.prepare import PrepareConfig, TokenizerConfig, prepare
    from franca.data.sources import CorpusConfig

    torch.set_num_threads(1)
    corpus = CorpusConfig(paths=(str(Path(os.__file__).parent / "ast.py"),), documents="paragraph")
    sources, tokenizer = {"ast": corpus}, TokenizerConfig(vocab_size=512)
    dataset = prepare(PrepareConfig(output=str(root / "data"), sources=sources, tokenizer=tokenizer))
    print("| mesh | ranks | family | loss | gradient's norm | held-out loss |\n|---|---|---|---|---|---|")
    for family in families:
        one = train(write(root / f"{family}.yaml", dataset, family, {}), 1)
        for sizes in every_mesh(family):
            ranks = math.prod(sizes.values())
            path = write(root / f"{family} {name_of(sizes)}.yaml", dataset, family, sizes)
            rows = (f"{value:.0e}" for value in differences(one, train(path, ranks)).values())
            print(f"| {name_of(sizes)} | {ranks} | {family} | {' | '.join(rows)} |", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES))

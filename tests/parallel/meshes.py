"""Real runs of `franca train` on many meshes, in processes that are forked: a start costs no imports."""

import multiprocessing
import os
import socket
from pathlib import Path

from franca.core.run import current_metrics


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
    from franca.train import loop

    output = os.open(path.with_suffix(f".{rank}.out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    assert loop.main(path, []) == 0


def found(folder: Path) -> dict[str, list[float]]:
    train, held_out = (list(current_metrics(folder / f"metrics{name}.jsonl")) for name in ("", ".validation"))
    return {
        "loss": [record["loss"] for record in train],
        "grad_norm": [record["grad_norm"] for record in train],
        "validation": [record["loss"] for record in held_out],
    }

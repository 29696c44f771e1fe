"""Runs in real processes, one per rank, that can be stopped and killed at a known step and a random moment of it."""

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Ranks:
    """Real processes, one per rank, each in `franca train`."""

    processes: list[Any]
    folder: Path

    def wait(self, timeout_s: float = 90.0) -> list[int]:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in alive:
            self.processes[rank].kill()
        assert not alive, f"ranks {alive} did not end within {timeout_s} s: {self.folder}"
        return [process.exitcode for process in self.processes]


@dataclass(frozen=True)
class Blow:
    """A real signal that a rank gets `after_s` seconds after it has begun `step`: in any phase of the steps that follow."""

    number: int
    step: int
    after_s: float
    ranks: tuple[int, ...]


def train(path: Path, words: list[str], variables: dict[str, str], log: Path, blow: Blow | None) -> None:
    os.environ.update(variables)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from franca.train import loop

    real_step = loop.step

    def step(run: loop.Run, batch: Any, num_valid: float) -> Any:
        if blow is not None and run.step == blow.step and run.world.rank in blow.ranks:
            threading.Timer(blow.after_s, os.kill, (os.getpid(), blow.number)).start()
        return real_step(run, batch, num_valid)

    loop.step = step
    sys.exit(loop.main(path, words))

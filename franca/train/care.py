"""What keeps a large run steady between its steps: Python's garbage collection, and how long a lost rank is waited for.

What it refuses to know: what a step does. It is told when one begins, on all ranks alike.
"""

import gc
from typing import Self

from franca.parallel import world
from franca.parallel.mesh import ParallelConfig
from franca.parallel.world import World

# A collection on one rank, at a moment of Python's choice, makes all ranks wait for that rank; so all collect at one step.
COLLECT_EVERY_STEPS = 100


class Care:
    """Around the loop of one attempt; a context manager, which leaves the collector as it found it."""

    def __init__(self, here: World, parallel: ParallelConfig) -> None:
        self.here, self.parallel, self.steps, self.collected = here, parallel, 0, gc.isenabled()

    def __enter__(self) -> Self:
        self._limit(self.parallel.first_timeout_s)
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        if self.collected:
            gc.enable()

    def step(self) -> None:
        """A step begins, on every rank: they have just agreed on it, so that the host of none is in an earlier one."""
        self.steps += 1
        if self.steps == 2:
            gc.collect()
            gc.freeze()  # what has been made by now lives as long as the run: no collection need look at it again
            gc.disable()
            self._limit(self.parallel.timeout_s)
        elif self.steps % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    def _limit(self, timeout_s: float) -> None:
        """GPUs only: what is slow for good reasons is waited for on the host, by gloo, and that has a limit of its own."""
        if self.here.device.type == "cuda" and self.here.size > 1:
            world.set_timeout("cuda", timeout_s)

"""What can interrupt a run, and the one verdict per step on which all ranks agree.

Signals only set a flag. The flag rides on the reduction that every step makes anyway (the count of valid tokens), so all
ranks stop after the same step.
"""

import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any

from franca.parallel.world import World

STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks do now. `num_valid`: the tokens of the coming step, over all ranks."""

    num_valid: float
    stop: bool
    save: bool


class Faults:
    """Listens for signals while it is open. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Faults":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agree(self, world: World, num_valid: int, save_due: bool) -> Verdict:
        """One reduction, on the host: this rank's valid tokens and wishes to everybody's. Rank 0's clock decides on saves."""
        save = save_due and world.is_main
        valid, stops, saves = world.sum([num_valid, self.received is not None, save])
        return Verdict(valid, stops > 0, saves > 0 or stops > 0)

"""Pure functions of the clock: the batch of every step, samples before it, the learning rate.

Nothing here has state, so a resumed run computes the same numbers as an uninterrupted one.
"""

import bisect
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from franca.core.config import Count, config
from franca.core.duration import Cadence, Clock, Duration, Unit

Decay = Literal["cosine", "linear", "constant"]


@config
class BatchRamp:
    """A batch that grows in equal increments, as Megatron-LM's `--rampup-batch-size start increment samples`."""

    start: Count
    increment: Count
    over: Cadence


@dataclass(frozen=True, slots=True)
class Stage:
    """From `step` (after `samples` samples) on, every step takes `batch_samples`."""

    step: int
    samples: int
    batch_samples: int


def batch_stages(batch_samples: int, ramp: BatchRamp | None) -> tuple[Stage, ...]:
    """The stages of a batch plan, in Megatron-LM's exact arithmetic (float division, `start` while it lasts).

    Source: Megatron-LM `RampupBatchsizeNumMicroBatchesCalculator`: with n = (batch - start) / increment and
    per = samples / n, batch(c) = start + int(c / per) * increment while c <= samples.
    Raises ValueError when the increments do not lead from start to the full batch, or `over` is not in samples.
    """
    if ramp is None:
        return (Stage(0, 0, batch_samples),)
    if ramp.over.unit != "samples":
        raise ValueError(f"batch_ramp.over is '{ramp.over}'; a ramp is measured in samples, for example '5M samples'")
    growth = batch_samples - ramp.start
    if min(growth, ramp.start, ramp.increment) < 1 or growth % ramp.increment:
        given = f"goes from {ramp.start} to {batch_samples} in increments of {ramp.increment}"
        raise ValueError(f"batch_ramp {given}: the difference must be a positive multiple of the increment")
    total = int(ramp.over.value)
    per_increment = total / (growth // ramp.increment)
    stages = [Stage(0, 0, ramp.start)]
    step = samples = 0
    while samples <= total:
        batch = ramp.start + int(samples / per_increment) * ramp.increment
        if batch != stages[-1].batch_samples:
            stages.append(Stage(step, samples, batch))
        step += 1
        samples += batch
    if stages[-1].batch_samples != batch_samples:
        stages.append(Stage(step, samples, batch_samples))
    return tuple(stages)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The clock of a whole run, known before it starts: every step's batch and where each step stands.

    `epoch_samples` is the number of rows that one pass over the data gives.
    """

    stages: tuple[Stage, ...]
    seq_len: int
    epoch_samples: int

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda stage: stage.step) - 1]

    def batch_samples(self, step: int) -> int:
        """Samples that step `step` (counted from 0) takes."""
        return self._stage(step).batch_samples

    def samples_before(self, step: int) -> int:
        """Samples taken by the steps 0 to step - 1: the index of the first sample of `step`."""
        stage = self._stage(step)
        return stage.samples + (step - stage.step) * stage.batch_samples

    def clock(self, step: int, seconds: float = 0.0) -> Clock:
        """Where the run stands when `step` steps are done."""
        samples = self.samples_before(step)
        return Clock(step, samples, samples * self.seq_len, samples / self.epoch_samples, seconds)

    def samples(self, duration: Duration) -> int:
        """A duration as a number of samples, rounded down to whole ones (epochs: up, an epoch means everything)."""
        if duration.unit == "steps":
            return self.samples_before(int(duration.value))
        if duration.unit == "tokens":
            return int(duration.value) // self.seq_len
        if duration.unit == "epochs":
            return math.ceil(Fraction(str(duration.value)) * self.epoch_samples)  # 1.1 epochs of 100 rows are 110, not 111
        if duration.unit == "samples":
            return int(duration.value)
        raise ValueError(f"'{duration}' is wall time; a length in steps, samples, tokens or epochs is needed here")

    def steps(self, duration: Duration) -> int:
        """A duration as a number of steps.

        Samples and tokens are a ceiling: as many whole batches as fit, as Megatron-LM counts. Epochs are a promise: the
        last batch is taken too, and the loader masks what lies beyond the end.
        """
        if duration.unit == "steps":
            return int(duration.value)
        samples = self.samples(duration)
        steps = self.steps_for(samples)
        return steps if duration.unit == "epochs" or self.samples_before(steps) == samples else steps - 1

    def steps_for(self, samples: int) -> int:
        """The number of steps in which `samples` samples are taken, the last of them perhaps in part."""
        stage = self.stages[bisect.bisect_right(self.stages, samples, key=lambda stage: stage.samples) - 1]
        return stage.step - (stage.samples - samples) // stage.batch_samples

    def measure(self, duration: Duration, unit: Unit) -> float:
        """A duration in another unit of the clock."""
        return float(duration.value) if duration.unit == unit else self.clock(self.steps(duration)).read(unit)


def learning_rate(position: float, *, peak: float, warmup: float, end: float, decay: Decay, final_ratio: float) -> float:
    """The learning rate at `position`; position, warm-up and end are in one unit (steps, samples or tokens).

    Linear from 0 over the warm-up, then down to `final_ratio * peak` at `end` and constant after it. The training loop
    passes the position at the end of the step, so that the first step has a rate above zero and the last the final rate.
    """
    if position < warmup:
        return peak * position / warmup
    if decay == "constant":
        return peak
    progress = 1.0 if position >= end else (position - warmup) / (end - warmup)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0 - progress
    return peak * (final_ratio + (1.0 - final_ratio) * remaining)

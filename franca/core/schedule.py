"""Pure functions of the clock: the batch of every step, samples before it, the learning rate.

Nothing here has state, so a resumed run computes the same numbers as an uninterrupted one. What it refuses to know: models
(of which it is told two numbers) and optimizers.
"""

import bisect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import ClassVar, Literal

from franca.core.config import Choice, Count, Positive, Share, config
from franca.core.duration import Cadence, Clock, Duration, Length, RepeatableCadence, Unit

# Hoffmann et al. 2022, table 3 (67.0B parameters: 1.5T tokens is 22; 1B: 20.2B). All parameters count, embeddings too: their
# table A9 has 44M for 8 layers of width 512, which holds the 32,000 rows of the (tied) embedding.
TOKENS_PER_PARAMETER = 20

At = Callable[[Unit], float]  # a point of the run: where it lies, in the unit that is asked for


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


def batch_stages(batch_samples: int, ramp: BatchRamp | None, step: int = 0, samples: int = 0) -> tuple[Stage, ...]:
    """The stages of a batch plan from (step, samples) on, in Megatron-LM's exact arithmetic (float division).

    Source: Megatron-LM `RampupBatchsizeNumMicroBatchesCalculator`: with n = (batch - start) / increment and
    per = samples / n, batch(c) = start + int(c / per) * increment while c <= samples.
    Raises ValueError when the increments do not lead from start to the full batch, or `over` is not in samples.
    """
    if ramp is None:
        return (Stage(step, samples, batch_samples),)
    if ramp.over.unit != "samples":
        raise ValueError(f"batch_ramp.over is '{ramp.over}'; a ramp is measured in samples, for example '5M samples'")
    growth = batch_samples - ramp.start
    if min(growth, ramp.start, ramp.increment) < 1 or growth % ramp.increment:
        given = f"goes from {ramp.start} to {batch_samples} in increments of {ramp.increment}"
        raise ValueError(f"batch_ramp {given}: the difference must be a positive multiple of the increment")
    total = int(ramp.over.value)
    per_increment = total / (growth // ramp.increment)
    stages: list[Stage] = []
    while samples <= total:
        batch = ramp.start + int(samples / per_increment) * ramp.increment
        if not stages or batch != stages[-1].batch_samples:
            stages.append(Stage(step, samples, batch))
        step += 1
        samples += batch
    if not stages or stages[-1].batch_samples != batch_samples:
        stages.append(Stage(step, samples, batch_samples))
    return tuple(stages)


def joined(past: Sequence[Stage], planned: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """What was, up to the step where `planned` begins, and then that. A plan that goes on as before leaves no seam."""
    first, kept = planned[0], tuple(stage for stage in past if stage.step < planned[0].step)
    if not kept:
        return planned
    last = kept[-1]  # and where its steps have led
    reached = last.samples + (first.step - last.step) * last.batch_samples
    return kept + planned[(reached, last.batch_samples) == (first.samples, first.batch_samples) :]


@dataclass(frozen=True, slots=True)
class Timeline:
    """The clock of a whole run, known before it starts: every step's batch and where each step stands.

    `epoch_samples` is the number of rows that one pass over the data gives. Without `flops_per_token` and `num_params`, the
    model's, lengths in FLOPs and chinchillas cannot be measured.
    """

    stages: tuple[Stage, ...]
    seq_len: int
    epoch_samples: int
    flops_per_token: float = 0.0
    num_params: int = 0

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda stage: stage.step) - 1]

    def _stage_of(self, samples: Fraction | int) -> Stage:
        return self.stages[bisect.bisect_right(self.stages, samples, key=lambda stage: stage.samples) - 1]

    def batch_samples(self, step: int) -> int:
        """Samples that step `step` (counted from 0) takes."""
        return self._stage(step).batch_samples

    def samples_before(self, step: int) -> int:
        """Samples taken by the steps 0 to step - 1: the index of the first sample of `step`."""
        stage = self._stage(step)
        return stage.samples + (step - stage.step) * stage.batch_samples

    def clock(self, step: int, seconds: float = 0.0, skipped: Collection[int] = ()) -> Clock:
        """Where the run stands when `step` steps are done; as if those of them that were `skipped` (from 0) had not been."""
        samples = self.samples_before(step) - sum(map(self.batch_samples, skipped))
        tokens = samples * self.seq_len
        chinchilla = tokens / (TOKENS_PER_PARAMETER * self.num_params) if self.num_params else 0.0
        epochs, flops = samples / self.epoch_samples, tokens * self.flops_per_token
        return Clock(step - len(skipped), samples, tokens, epochs, seconds, flops, chinchilla)

    def _samples_per(self, unit: Unit) -> Fraction:
        """What one of a unit other than steps is in samples."""
        if unit == "flops":
            return 1 / (Fraction(self.flops_per_token) * self.seq_len)
        row, chinchilla = self.seq_len, TOKENS_PER_PARAMETER * self.num_params
        tokens = {"samples": row, "tokens": 1, "epochs": row * self.epoch_samples, "chinchilla": chinchilla}
        return Fraction(tokens[unit], row)

    def _exact(self, duration: Duration) -> Fraction:
        """A duration in samples, not rounded."""
        if duration.unit == "seconds":
            raise ValueError(f"'{duration}' is wall time; a length in steps, samples, tokens, epochs or FLOPs is needed here")
        if duration.unit == "steps":
            return Fraction(self.samples_before(int(duration.value)))
        return Fraction(str(duration.value)) * self._samples_per(duration.unit)  # 1.1 epochs of 100 rows are 110, not 111

    def samples(self, duration: Duration) -> int:
        """A duration as a number of samples, rounded down to whole ones (epochs: up, an epoch means everything)."""
        exact = self._exact(duration)
        return math.ceil(exact) if duration.unit == "epochs" else math.floor(exact)

    def steps(self, duration: Duration) -> int:
        """A duration as a number of steps.

        Samples, tokens and FLOPs are a ceiling: as many whole batches as fit, as Megatron-LM counts. Epochs are a promise: the
        last batch is taken too, and the loader masks what lies beyond the end.
        """
        if duration.unit == "steps":
            return int(duration.value)
        samples = self.samples(duration)
        steps = self.steps_for(samples)
        return steps if duration.unit == "epochs" or self.samples_before(steps) == samples else steps - 1

    def steps_for(self, samples: int) -> int:
        """The number of steps in which `samples` samples are taken, the last of them perhaps in part."""
        stage = self._stage_of(samples)
        return stage.step - (stage.samples - samples) // stage.batch_samples

    def measure(self, duration: Duration, unit: Unit) -> float:
        """A duration from the start, in another unit of the clock; not rounded."""
        if duration.unit == unit:
            return float(duration.value)
        samples = self._exact(duration)
        if unit != "steps":
            return float(samples / self._samples_per(unit))
        stage = self._stage_of(samples)
        return float(stage.step + (samples - stage.samples) / stage.batch_samples)


def listed_stages(
    listed: Sequence[tuple[Duration, int]], scale: Timeline, step: int = 0, samples: int = 0
) -> tuple[Stage, ...]:
    """The stages of a list (start, batch) from (step, samples) on. A batch begins with the first step at or after its start.

    `scale` measures the starts; its own stages are not looked at. Raises ValueError when a stage of the list would never be.
    """
    stages: list[Stage] = []
    for number, (start, batch) in enumerate(listed):
        here = stages[-1] if stages else Stage(step, samples, batch)
        exact = None if start.unit == "steps" else scale._exact(start)
        wait = int(start.value) - here.step if exact is None else math.ceil((exact - here.samples) / here.batch_samples)
        if not number and start.value:
            raise ValueError(f"batch_stages begins at '{start}'; the first stage must begin at '0 {start.unit}'")
        if number and wait < 1 and step == 0:
            raise ValueError(f"batch_stages: the stage at '{start}' does not begin after the one before it has taken a step")
        if wait > 0:
            stages.append(Stage(here.step + wait, here.samples + wait * here.batch_samples, batch))
        else:
            stages[-1:] = [Stage(here.step, here.samples, batch)]
    return tuple(stages)


Shape = Literal["linear", "sqrt", "1-sqrt", "harmonic"]


def descend(shape: Shape, progress: float, high: float, low: float) -> float:
    """From `high` at progress 0 to `low` at 1; p is the progress.

    linear: 1 - p. sqrt: sqrt(1 - p). 1-sqrt: 1 - sqrt(p) (Hägele et al. 2024). harmonic: 1 / rate goes straight (Wen et al.
    2024, and Meta Lingua); it needs a `low` above 0.
    """
    if shape == "harmonic":
        return 1.0 / (progress / low + (1.0 - progress) / high)
    remaining = 1.0 - math.sqrt(progress) if shape == "1-sqrt" else 1.0 - progress
    return low + (high - low) * (math.sqrt(remaining) if shape == "sqrt" else remaining)


_NEVER_ZERO = "shape: harmonic never reaches a final_ratio of 0; give one above it, or another shape"


class Decay(Choice):
    """The open choice `optim.decay`: the learning rate after the warm-up, as a share of its peak.

    `now`, `warmup` (its end) and `end` are points of the run; `unit` is the one that the schedule is written in.
    """

    default_kind: ClassVar[str | None] = "cosine"

    def until(self) -> Duration | None:
        """Where it ends, from the start of the run; None: with the run, or never."""
        return None

    def problems(self, warmup: At, end: At, unit: Unit) -> list[str]:
        """What is wrong with it in this run, one line each."""
        return []

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        raise NotImplementedError


@config
class ConstantDecay(Decay):
    """None: the peak for ever, or until a cool-down."""

    kind: Literal["constant"]

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        return 1.0


@config
class InverseSqrtDecay(Decay):
    """(warm-up / now) to the power of `exponent` (Vaswani et al. 2017, equation 3), not below `final_ratio`."""

    kind: Literal["inverse_sqrt"]
    exponent: Positive = 0.5
    final_ratio: Share = 0.0

    def problems(self, warmup: At, end: At, unit: Unit) -> list[str]:
        return [] if warmup(unit) else ["kind: inverse_sqrt is measured by the warm-up; give an optim.warmup above 0"]

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        return max((warmup(unit) / now(unit)) ** self.exponent, self.final_ratio)


@config
class FallingDecay(Decay):
    """Down to `final_ratio` at `end` (from the start, warm-up included; None: of the run), constant after it."""

    end: Length | None = None
    final_ratio: Share = 0.1

    def until(self) -> Duration | None:
        return self.end

    def progress(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        """From 0 at the end of the warm-up to 1 at the end of the decay."""
        here, first, last = now(unit), warmup(unit), end(unit)
        return 1.0 if here >= last else max(0.0, (here - first) / (last - first))


@config
class LinearDecay(FallingDecay):
    """Straight down."""

    kind: Literal["linear"]

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        return descend("linear", self.progress(now, warmup, end, unit), 1.0, self.final_ratio)


@config
class CosineDecay(FallingDecay):
    """Half a cosine (Loshchilov and Hutter 2017, equation 5), `cycles` times with warm restarts."""

    kind: Literal["cosine"] = "cosine"
    cycles: Count = 1
    power: Positive = 1.0  # of the progress; above 1 the rate stays high for longer

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        cycles = self.cycles * self.progress(now, warmup, end, unit) ** self.power
        within = cycles - max(0, math.ceil(cycles) - 1)  # the step that ends a cycle has its final rate
        return self.final_ratio + (1.0 - self.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * within))


@config
class WSDDecay(FallingDecay):
    """Warm-up, stable, decay (Hu et al. 2024): the peak, and a descent to `final_ratio` that is over at `end`.

    The descent takes `length`, or a `share` of all that came before its end; the latter with `cycles`, each of which returns
    to the peak at once (WSD-S, Wen et al. 2024).
    """

    kind: Literal["wsd"]
    shape: Shape = "1-sqrt"
    length: RepeatableCadence | None = None
    share: Share | None = None
    cycles: Count = 1

    def problems(self, warmup: At, end: At, unit: Unit) -> list[str]:
        length, share = self.length, self.share or 0.0
        if (length is None) == (share == 0.0):
            return ["length: the descent of wsd needs a length, or a share above 0 of the run; give one of them"]
        if length is not None and self.cycles > 1:
            return ["cycles: go with a share of the run; give share instead of length"]
        if length is not None:
            early = end(length.unit) - length.value < warmup(length.unit)
        else:
            early = (1.0 - share) * end(unit) / self.cycles < warmup(unit) or share * self.cycles > 1.0
        if early:
            return ["length: the descent begins before the warm-up (or the cycle before it) is over; shorten it"]
        return [_NEVER_ZERO] if self.shape == "harmonic" and not self.final_ratio else []

    def ratio(self, now: At, warmup: At, end: At, unit: Unit) -> float:
        if self.length is not None:
            total, left = float(self.length.value), end(self.length.unit) - now(self.length.unit)
        else:
            size = end(unit) / self.cycles
            cycle_end = size * min(self.cycles, max(1, math.ceil(now(unit) / size)))
            total, left = (self.share or 0.0) * cycle_end, cycle_end - now(unit)
        return descend(self.shape, min(1.0, max(0.0, 1.0 - left / total)), 1.0, self.final_ratio)


@config
class Cooldown:
    """From `start` on, whatever the schedule was, from the rate that it had there to `final_ratio` of the peak."""

    start: Length
    length: RepeatableCadence
    shape: Shape = "1-sqrt"
    final_ratio: Share = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of a run of `length`, as a share of its peak: linear from 0 over the warm-up, then the decay.

    The decay runs in the unit of its `end`, or if that is the run's in the unit of the warm-up.
    """

    timeline: Timeline
    length: Duration
    warmup: Duration
    decay: Decay
    cooldown: Cooldown | None = None

    def _points(self) -> tuple[At, At, Unit]:
        """The end of the warm-up, the end of the decay, and the unit of the decay."""
        until, measure = self.decay.until(), self.timeline.measure
        if until is not None:
            return partial(measure, self.warmup), partial(measure, until), until.unit
        last = self.timeline.clock(self.timeline.steps(self.length))  # in whole steps, so that the last has the final rate
        return partial(measure, self.warmup), last.read, self.warmup.unit

    def at(self, now: At) -> float:
        """The share at a point of the run.

        The training loop passes the end of a step, so that the first step has a rate above zero and the last the final rate.
        """
        cool, measure = self.cooldown, self.timeline.measure
        if cool is not None and (done := now(cool.length.unit) - measure(cool.start, cool.length.unit)) > 0:
            high = self._planned(partial(measure, cool.start))
            return descend(cool.shape, min(1.0, done / cool.length.value), high, cool.final_ratio)
        return self._planned(now)

    def _planned(self, now: At) -> float:
        """The share without a cool-down."""
        if (here := now(self.warmup.unit)) < self.warmup.value:
            return here / self.warmup.value
        return self.decay.ratio(now, *self._points())

    def problems(self) -> list[str]:
        """What is wrong with it, as lines that begin with the key."""
        until = self.decay.until() or self.length
        late = self.timeline.measure(self.warmup, "samples") >= self.timeline.measure(until, "samples")
        if late and isinstance(self.decay, FallingDecay):
            return [f"warmup: '{self.warmup}' is not shorter than the decay's end ('{until}'); shorten it"]
        found = [f"decay.{line}" for line in self.decay.problems(*self._points())]
        cool, measure = self.cooldown, self.timeline.measure
        if cool is None or found:
            return found
        if measure(cool.start, "samples") >= measure(self.length, "samples"):
            return [f"cooldown.start: '{cool.start}' is not before the end of the run ('{self.length}'), so it has no effect"]
        if self._planned(partial(measure, cool.start)) <= cool.final_ratio:
            return [f"cooldown.final_ratio: at '{cool.start}' the rate is at {cool.final_ratio} of its peak or below; lower it"]
        return [f"cooldown.{_NEVER_ZERO}"] if cool.shape == "harmonic" and not cool.final_ratio else []

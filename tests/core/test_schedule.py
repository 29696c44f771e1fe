"""Megatron-LM's golden numbers, and closed formulas against naive loops."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.duration import Clock, Duration
from franca.core.schedule import BatchRamp, Stage, Timeline, batch_stages, joined, listed_stages

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
TR1 = batch_stages(1024, BatchRamp(start=16, increment=16, over=Duration.parse("5M samples")))


def tr1_timeline():
    return Timeline(TR1, 2048, epoch_samples=10**9)


@pytest.mark.parametrize(("text", "steps"), [("300M samples", 311_541), ("145M samples", 160_174), ("150M samples", 165_057)])
def test_the_steps_of_tr1_are_megatrons(text, steps):
    assert tr1_timeline().steps(Duration.parse(text)) == steps


def test_the_stages_of_tr1_are_megatrons():
    golden = {
        32: (4961, 79_376),
        48: (7441, 158_736),
        64: (9095, 238_128),
        80: (10_335, 317_488),
        512: (19_978, 2_460_368),
        1008: (23_377, 4_920_896),
        1024: (23_456, 5_000_528),
    }
    stages = {stage.batch_samples: (stage.step, stage.samples) for stage in TR1}
    assert list(stages) == list(range(16, 1025, 16))
    assert {batch: stages[batch] for batch in golden} == golden


def test_the_warmup_of_tr1_ends_at_megatrons_iteration():
    """216,320 samples: its seed document says 2,000 steps, an older ramp's number."""
    assert tr1_timeline().steps_for(216_320) == 8641
    assert tr1_timeline().batch_samples(8640) == 48


@pytest.mark.parametrize(("step", "samples"), [(29_020, 10_698_064), (168_000, 153_013_584), (23_456, 5_000_528), (0, 0)])
def test_the_consumed_samples_of_tr1_are_megatrons(step, samples):
    assert tr1_timeline().samples_before(step) == samples
    assert tr1_timeline().clock(step, 2.5) == Clock(step, samples, samples * 2048, samples / 10**9, 2.5)


def naive_batches(batch, start, increment, over):
    """Batch after batch, as Megatron-LM's calculator is updated: by what was consumed before the step."""
    per = over / ((batch - start) // increment)
    consumed = 0
    while True:
        size = batch if consumed > over else start + int(consumed / per) * increment
        yield consumed, size
        consumed += size


@PROPERTY
@given(start=st.integers(1, 20), increment=st.integers(1, 20), rises=st.integers(1, 12), over=st.integers(1, 3000))
def test_every_step_of_a_ramp_agrees_with_a_naive_loop(start, increment, rises, over):
    batch = start + rises * increment
    stages = batch_stages(batch, BatchRamp(start=start, increment=increment, over=Duration(over, "samples")))
    timeline = Timeline(stages, 8, 100)
    for step, (consumed, size) in zip(range(400), naive_batches(batch, start, increment, over), strict=False):
        assert (timeline.samples_before(step), timeline.batch_samples(step)) == (consumed, size)
    assert stages[-1].batch_samples == batch


@PROPERTY
@given(samples=st.integers(0, 5000), over=st.integers(1, 2000), epoch=st.integers(1, 700))
def test_steps_are_the_whole_batches_that_fit(samples, over, epoch):
    timeline = Timeline(batch_stages(40, BatchRamp(start=8, increment=8, over=Duration(over, "samples"))), 8, epoch)
    steps = timeline.steps(Duration(samples, "samples"))
    assert timeline.samples_before(steps) <= samples < timeline.samples_before(steps + 1)
    assert timeline.steps(Duration(samples * 8 + 7, "tokens")) == steps
    assert timeline.steps(Duration(steps, "steps")) == steps
    epochs = timeline.steps(Duration(2, "epochs"))  # a promise: the last rows are taken too
    assert timeline.samples_before(epochs - 1) < 2 * epoch <= timeline.samples_before(epochs)


def test_a_batch_without_a_ramp_is_one_stage():
    assert batch_stages(7, None) == (Stage(0, 0, 7),)
    assert Timeline(batch_stages(7, None), 8, 100).samples_before(11) == 77


@pytest.mark.parametrize(
    ("batch", "start", "increment", "over", "message"),
    [
        (1024, 16, 15, "5M samples", "in increments of 15: the difference must be a positive multiple"),
        (1024, 1024, 16, "5M samples", "the difference must be a positive multiple"),
        (1024, 2048, 16, "5M samples", "the difference must be a positive multiple"),
        (1024, 0, 16, "5M samples", "goes from 0 to 1024"),
        (1024, 16, 0, "5M samples", "increments of 0"),
        (1024, 16, 16, "5M tokens", "measured in samples, for example '5M samples'"),
        (0, 16, 16, "5M samples", "goes from 16 to 0"),
    ],
)
def test_a_ramp_that_does_not_lead_to_the_batch_is_refused(batch, start, increment, over, message):
    with pytest.raises(ValueError, match=message):
        batch_stages(batch, BatchRamp(start=start, increment=increment, over=Duration.parse(over)))


@pytest.mark.parametrize(
    ("text", "samples"),
    [("3 steps", 30), ("25 samples", 25), ("161 tokens", 20), ("2 epochs", 200), ("1.1 epochs", 110), ("0.005 epochs", 1)],
)
def test_a_duration_in_samples(text, samples):
    assert Timeline((Stage(0, 0, 10),), 8, 100).samples(Duration.parse(text)) == samples


def test_wall_time_is_no_number_of_samples():
    with pytest.raises(
        ValueError, match=r"'1200 seconds' is wall time; a length in steps, samples, tokens, epochs or FLOPs is needed"
    ):
        Timeline((Stage(0, 0, 10),), 8, 100).samples(Duration.parse("20 min"))


def test_a_duration_is_measured_in_every_unit():
    timeline = Timeline((Stage(0, 0, 10),), 8, 100)
    found = [timeline.measure(Duration(5, "steps"), unit) for unit in ("steps", "samples", "tokens", "epochs")]
    assert found == [5.0, 50.0, 400.0, 0.5]
    assert timeline.measure(Duration(55, "samples"), "samples") == 55.0  # its own unit is not rounded to batches


def test_between_batches_steps_are_measured_in_parts():
    timeline = Timeline((Stage(0, 0, 10), Stage(3, 30, 20)), 8, 100)
    found = [timeline.measure(Duration(samples, "samples"), "steps") for samples in (0, 25, 30, 35, 90)]
    assert found == [0.0, 2.5, 3.0, 3.25, 6.0]
    assert timeline.measure(Duration(0.9, "epochs"), "steps") == 6.0


def test_flops_and_chinchillas_follow_from_the_model():
    timeline = Timeline((Stage(0, 0, 10),), 8, 100, flops_per_token=1e6, num_params=400)
    assert timeline.clock(25) == Clock(25, 250, 2000, 2.5, 0.0, 2e9, 0.25)
    for text, steps in (
        ("1 chinchilla", 100),
        ("0.255 chinchilla", 25),
        ("8e9 FLOPs", 100),
        ("8 GFLOPs", 100),
        ("2.07 GFLOPs", 25),
    ):
        assert timeline.steps(Duration.parse(text)) == steps, text
    assert timeline.measure(Duration.parse("8e9 FLOPs"), "chinchilla") == 1.0
    assert timeline.measure(Duration.parse("1 chinchilla"), "flops") == 8e9
    assert timeline.measure(Duration.parse("50 steps"), "chinchilla") == 0.5


def test_skipped_steps_are_left_out_of_the_clock():
    timeline = Timeline((Stage(0, 0, 10), Stage(3, 30, 20)), 8, 100, 1e6, 400)
    assert timeline.clock(5, skipped=(1, 3, 4)) == Clock(2, 20, 160, 0.2, 0.0, 1.6e8, 0.02)


def naive_list(listed, reached):
    """Batch after batch: the last stage whose start is reached before the step."""
    step = samples = 0
    while True:
        size = [batch for start, batch in listed if reached(start, step, samples)][-1]
        yield samples, size
        step, samples = step + 1, samples + size


@PROPERTY
@given(
    waits=st.lists(st.integers(60, 200), max_size=4),
    batches=st.lists(st.integers(1, 60), min_size=5, max_size=5),
    unit=st.sampled_from(["steps", "samples", "tokens", "epochs", "flops"]),
)
def test_a_list_of_stages_agrees_with_a_naive_loop(waits, batches, unit):
    scale = Timeline((), 8, 100, flops_per_token=3.0)
    per = {"steps": 1, "samples": 1, "tokens": 8, "epochs": 0.01, "flops": 24.0}[unit]
    starts = [0, *itertools.accumulate(waits)]
    listed = [(Duration(start * per, unit), batch) for start, batch in zip(starts, batches, strict=False)]
    timeline = replace(scale, stages=listed_stages(listed, scale))

    def reached(start, step, samples):
        return (step if unit == "steps" else samples) >= round(start.value / per)

    for step, (samples, size) in zip(range(300), naive_list(listed, reached), strict=False):
        assert (timeline.samples_before(step), timeline.batch_samples(step)) == (samples, size)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([("5 steps", 8)], "begins at '5 steps'; the first stage must begin at '0 steps'"),
        ([("0 steps", 8), ("7 steps", 4), ("7 steps", 6)], "'7 steps' does not begin after the one before it has taken a step"),
        ([("0 steps", 8), ("9 samples", 4), ("15 samples", 6)], "the stage at '15 samples' does not begin after"),
        ([("0 samples", 8), ("9 steps", 4), ("40 samples", 6)], "the stage at '40 samples' does not begin after"),
    ],
)
def test_a_stage_that_would_never_be_is_refused(listed, message):
    with pytest.raises(ValueError, match=message):
        listed_stages([(Duration.parse(start), batch) for start, batch in listed], Timeline((), 8, 100))


PLANS = {
    "fixed": lambda step, samples: batch_stages(24, None, step, samples),
    "ramp": lambda step, samples: batch_stages(
        40, BatchRamp(start=8, increment=4, over=Duration(700, "samples")), step, samples
    ),
    "listed": lambda step, samples: listed_stages(LISTED, Timeline((), 8, 100), step, samples),
}
LISTED = [(Duration(0, "samples"), 6), (Duration(800, "tokens"), 10), (Duration(30, "steps"), 33)]


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_continued_at_any_step_is_the_plan(name):
    plan = PLANS[name]
    whole = Timeline(plan(0, 0), 8, 100)
    for step in range(60):
        past = [stage for stage in whole.stages if stage.step < step]
        assert joined(past, plan(step, whole.samples_before(step))) == whole.stages


@PROPERTY
@given(changes=st.lists(st.tuples(st.sampled_from(sorted(PLANS)), st.integers(1, 25)), min_size=1, max_size=5))
def test_batch_plans_that_follow_each_other_lose_and_repeat_no_sample(changes):
    stages, step, samples, ledger = (), 0, 0, []
    for name, steps in changes:
        past = [stage for stage in stages if stage.step < step]  # what a checkpoint keeps
        stages = joined(past, PLANS[name](step, samples))
        timeline = Timeline(stages, 8, 100)
        for number in range(step, step + steps):
            first = timeline.samples_before(number)
            ledger += range(first, first + timeline.batch_samples(number))
        step, samples = step + steps, timeline.samples_before(step + steps)
        assert ledger == list(range(samples))
        assert all(timeline.samples_before(timeline.steps_for(count)) >= count for count in range(samples))

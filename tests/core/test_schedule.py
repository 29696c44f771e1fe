"""Megatron-LM's golden numbers, and closed formulas against naive loops."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.duration import Clock, Duration
from franca.core.schedule import BatchRamp, Stage, Timeline, batch_stages, learning_rate

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
        ValueError, match=r"'1200 seconds' is wall time; a length in steps, samples, tokens or epochs is needed"
    ):
        Timeline((Stage(0, 0, 10),), 8, 100).samples(Duration.parse("20 min"))


def test_a_duration_is_measured_in_every_unit():
    timeline = Timeline((Stage(0, 0, 10),), 8, 100)
    found = [timeline.measure(Duration(5, "steps"), unit) for unit in ("steps", "samples", "tokens", "epochs")]
    assert found == [5.0, 50.0, 400.0, 0.5]
    assert timeline.measure(Duration(55, "samples"), "samples") == 55.0  # its own unit is not rounded to batches


def rate(position, decay="cosine", warmup=100.0, end=1000.0, final_ratio=0.1):
    return learning_rate(position, peak=3e-4, warmup=warmup, end=end, decay=decay, final_ratio=final_ratio)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_never_again(decay):
    rising, falling = [rate(p, decay) for p in range(101)], [rate(p, decay) for p in range(100, 1101)]
    assert (rising[0], rising[50], rising[100]) == (0.0, 1.5e-4, 3e-4)
    assert all(before < after for before, after in itertools.pairwise(rising))
    assert all(before >= after for before, after in itertools.pairwise(falling))


@pytest.mark.parametrize(("decay", "final"), [("cosine", 3e-5), ("linear", 3e-5), ("constant", 3e-4)])
def test_the_rate_ends_at_its_final_value_and_stays_there(decay, final):
    assert [rate(p, decay) for p in (1000, 1001, 10**9)] == pytest.approx([final] * 3, rel=1e-12)


@PROPERTY
@given(position=st.floats(0, 3000), warmup=st.floats(0, 500), final_ratio=st.floats(0, 1))
def test_the_rate_agrees_with_the_formulas(position, warmup, final_ratio):
    progress = min(1.0, max(0.0, (position - warmup) / (1000.0 - warmup)))
    low = 3e-4 * final_ratio
    rise = min(1.0, position / warmup) if warmup else 1.0
    cosine = low + (3e-4 - low) * (1 + math.cos(math.pi * progress)) / 2
    linear = 3e-4 + (low - 3e-4) * progress
    for decay, expected in (("cosine", cosine), ("linear", linear), ("constant", 3e-4)):
        expected = 3e-4 * rise if position < warmup else expected
        assert rate(position, decay, warmup, 1000.0, final_ratio) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_half_way_down_both_decays_are_half_way():
    middle = (3e-4 + 3e-5) / 2
    assert rate(550, "cosine") == pytest.approx(middle, rel=1e-12)
    assert rate(550, "linear") == pytest.approx(middle, rel=1e-12)
    assert rate(325, "cosine") == pytest.approx(3e-5 + 2.7e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)


def test_without_warmup_the_first_rate_is_the_peak_and_a_warmup_as_long_as_the_run_ends_at_the_final_rate():
    assert rate(0.0, warmup=0.0) == 3e-4
    assert rate(1000.0, warmup=1000.0) == pytest.approx(3e-5)

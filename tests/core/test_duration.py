"""Durations as a user writes them, and cadences that need no memory."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.duration import Clock, Duration, crossed
from franca.core.schedule import Stage, Timeline

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("5M samples", 5_000_000, "samples"),
        ("5 M samples", 5_000_000, "samples"),
        ("1.5k samples", 1500, "samples"),
        ("260B tokens", 260 * 10**9, "tokens"),
        ("260G tokens", 260 * 10**9, "tokens"),
        ("1.3T tokens", 1_300 * 10**9, "tokens"),
        ("0.1M tokens", 100_000, "tokens"),
        ("1e9 tokens", 10**9, "tokens"),
        ("2.5E+3 steps", 2500, "steps"),
        ("10_000 steps", 10_000, "steps"),
        ("2 epochs", 2, "epochs"),
        ("0.5 epoch", 0.5, "epochs"),
        ("26.2e18 FLOPs", 26_200 * 10**15, "flops"),
        ("26.2E FLOPs", 26_200 * 10**15, "flops"),
        ("26.2 EFLOPs", 26_200 * 10**15, "flops"),
        ("3 ZFLOPs", 3 * 10**21, "flops"),
        ("1.5P flop", 1500 * 10**12, "flops"),
        ("1 chinchilla", 1, "chinchilla"),
        ("0.25 Chinchilla", 0.25, "chinchilla"),
        ("20 min", 1200, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("2 days", 172_800, "seconds"),
        ("90 s", 90, "seconds"),
        ("0.5 seconds", 0.5, "seconds"),
        ("  7   Steps ", 7, "steps"),
    ],
)
def test_durations_are_understood(text, value, unit):
    parsed = Duration.parse(text)
    assert (parsed.value, parsed.unit, type(parsed.value)) == (value, unit, type(value))


@pytest.mark.parametrize(
    "text", ["", "2000", "steps", "-5 steps", "5 % steps", "5 steps later", "5Q steps", "1,000 steps", ". steps"]
)
def test_what_is_no_number_and_unit_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="is not a number and a unit, for example '2000 steps'"):
        Duration.parse(text)


@pytest.mark.parametrize("value", [2000, 1.5, None, True, ["5 steps"]])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="is not a number and a unit"):
        Duration.parse(value)


def test_an_unknown_unit_is_named():
    with pytest.raises(ValueError, match="'5 batches': 'batches' is not a unit; expected a number and a unit"):
        Duration.parse("5 batches")


@pytest.mark.parametrize("text", ["1.5 steps", "1e-3 steps", "0.0001k samples", "1.2345k tokens"])
def test_parts_of_a_step_sample_or_token_are_refused(text):
    with pytest.raises(ValueError, match="is not a whole number of"):
        Duration.parse(text)


@pytest.mark.parametrize(
    "text",
    ["2000 steps", "5M samples", "0.3 epochs", "0.00001 epochs", "1e17 tokens", "26.2e18 FLOPs", "0.3 chinchilla", "20 min"],
)
def test_a_duration_is_itself_again_after_printing(text):
    duration = Duration.parse(text)
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(duration) is duration


def test_a_clock_reads_every_unit():
    clock = Clock(step=1, samples=2, tokens=3, epochs=4.5, seconds=5.5)
    assert [clock.read(unit) for unit in ("steps", "samples", "tokens", "epochs", "seconds")] == [1.0, 2.0, 3.0, 4.5, 5.5]


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens", "epochs", "seconds"])
def test_a_multiple_is_crossed_when_reached_and_not_when_left(unit):
    def at(value):
        return Clock(**{"step" if unit == "steps" else unit: value})

    every = Duration(10, unit)
    assert [crossed(every, at(a), at(b)) for a, b in [(0, 9), (9, 10), (10, 11), (8, 13), (5, 35), (10, 10)]] == [
        False,
        True,
        False,
        True,
        True,
        False,
    ]


def steps_crossed(every, timeline, begin, end):
    return [step + 1 for step in range(begin, end) if crossed(every, timeline.clock(step), timeline.clock(step + 1))]


DURATIONS = st.one_of(
    st.builds(Duration, st.integers(1, 40), st.just("steps")),
    st.builds(Duration, st.integers(1, 500), st.just("samples")),
    st.builds(Duration, st.integers(1, 5000), st.just("tokens")),
    st.builds(Duration, st.sampled_from([0.1, 0.25, 0.3, 0.7, 1, 2]), st.just("epochs")),
)


@PROPERTY
@given(every=DURATIONS, batch=st.integers(1, 30), epoch=st.integers(1, 300), resume=st.integers(0, 80))
def test_cadences_do_not_depend_on_where_a_run_was_resumed(every, batch, epoch, resume):
    timeline = Timeline((Stage(0, 0, batch), Stage(10, 10 * batch, batch + 3)), 16, epoch)
    whole = steps_crossed(every, timeline, 0, 80)
    assert steps_crossed(every, timeline, 0, resume) + steps_crossed(every, timeline, resume, 80) == whole
    consumed = timeline.clock(80)
    multiples = int(consumed.read(every.unit) / every.value + 1e-9)
    assert len(whole) <= multiples
    assert bool(whole) == (multiples > 0)


@PROPERTY
@given(every=st.integers(1, 5000), batch=st.integers(1, 30))
def test_cadences_agree_with_whole_numbers(every, batch):
    timeline = Timeline((Stage(0, 0, batch),), 16, 1000)
    expected = [step for step in range(1, 200) if step * batch * 16 // every > (step - 1) * batch * 16 // every]
    assert steps_crossed(Duration(every, "tokens"), timeline, 0, 199) == expected


@pytest.mark.parametrize("every", [0.1, 0.3, 0.7, 0.05])
def test_fractions_of_an_epoch_are_crossed_at_their_own_step(every):
    timeline = Timeline((Stage(0, 0, 1),), 16, 100)
    per = round(every * 100)
    assert steps_crossed(Duration(every, "epochs"), timeline, 0, 1000) == list(range(per, 1001, per))

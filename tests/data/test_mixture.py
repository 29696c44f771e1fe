"""Exact interleaving against the naive count: every prefix, any place, weights of any kind."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.data.mixture import Mixture

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
WEIGHTS = st.lists(st.floats(0.001, 10.0) | st.sampled_from([0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=12)


def error(streams, weights):
    """The farthest that any stream is from its share after any sample."""
    shares = np.array(weights) / sum(weights)
    taken = np.stack([np.cumsum(streams == stream) for stream in range(len(weights))])
    return np.abs(taken - np.outer(shares, np.arange(1, len(streams) + 1))).max()


def test_two_hundred_mixtures_keep_within_one_sample_at_every_prefix_of_100_000():
    rng = np.random.default_rng(20261121)
    for number in range(200):
        weights = (rng.random(rng.integers(2, 12)) ** rng.integers(1, 4) + 0.001).round(int(rng.integers(3, 17))).tolist()
        streams, numbers = Mixture(weights).draw(np.arange(100_000))
        assert error(streams, weights) <= 1 + 1e-9, (number, weights)
        for stream in range(len(weights)):
            assert (numbers[streams == stream] == np.arange((streams == stream).sum())).all()


@PROPERTY
@given(weights=WEIGHTS, samples=st.integers(0, 10**12), length=st.integers(1, 3000))
def test_far_away_it_is_as_exact_as_at_the_start(weights, samples, length):
    mixture = Mixture(weights)
    before, after = mixture.counts(samples), mixture.counts(samples + length)
    streams, numbers = mixture.draw(np.arange(samples, samples + length))
    exact = [Fraction(str(weight)) for weight in weights]
    assert before.sum() == samples
    assert all(abs(int(n) - samples * w / sum(exact)) <= 1 for n, w in zip(before, exact, strict=True))
    np.testing.assert_array_equal(before + np.bincount(streams, minlength=len(weights)), after)
    for stream in range(len(weights)):
        own = numbers[streams == stream]
        np.testing.assert_array_equal(own, before[stream] + np.arange(len(own)))


@PROPERTY
@given(weights=WEIGHTS, count=st.integers(1, 10**6), draw=st.data())
def test_reach_is_the_first_prefix_that_holds_so_many(weights, count, draw):
    mixture, stream = Mixture(weights), draw.draw(st.integers(0, len(weights) - 1))
    samples = mixture.reach(stream, count)
    assert mixture.counts(samples)[stream] == count
    assert mixture.counts(samples - 1)[stream] == count - 1
    assert mixture.reach(stream, 0) == 0


def test_samples_may_be_asked_for_in_any_order():
    mixture = Mixture([3, 0, 1.5, 0.25])
    together = mixture.draw(np.arange(20_000))
    some = np.array([19_999, 0, 1023, 1024, 7, 7, 12_345])
    for column, alone in zip(together, Mixture([3, 0, 1.5, 0.25]).draw(some), strict=True):
        np.testing.assert_array_equal(alone, column[some])
    assert not (together[0] == 1).any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.0, 0.0], "one must be above zero"), ([1.0, -1.0], "must not be negative"), ([1.0, 9e-7], "at least 1e-06")],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(weights)

"""The order against naive references: a bijection, exact shares, no row twice, nothing that depends on the question."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.data.order import Order, Source, permute

PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)
KEY = np.uint64(0x1234_5678_9ABC_DEF0)
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=5)


def as_rows(spans):
    columns = spans.sources.tolist(), spans.starts.tolist(), spans.counts.tolist(), spans.epochs.tolist()
    return list(zip(*columns, strict=True))


def naive_permute(index, size, key):
    """The same Feistel network in Python's integers."""
    mask = 2**64 - 1

    def scramble(value):
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
        return value ^ (value >> 31)

    bits = max(2, (size - 1).bit_length())
    while True:
        low_bits = bits // 2
        for number in range(6):
            high_bits = bits - low_bits
            low, high = index % 2**low_bits, index >> low_bits
            index = low << high_bits | (high ^ scramble((low + key + number * 0x9E3779B97F4A7C15) & mask)) % 2**high_bits
            low_bits = high_bits
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 1000, 2**16 - 1, 2**16, 2**16 + 1, 200003])
@pytest.mark.parametrize("key", [0, int(KEY), 2**64 - 1])
def test_permute_is_a_bijection(size, key):
    found = permute(np.arange(size), size, np.uint64(key))
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


@PROPERTY
@given(size=st.integers(1, 2**45), key=st.integers(0, 2**64 - 1), draw=st.data())
def test_permute_agrees_with_python_integers(size, key, draw):
    indices = draw.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    found = permute(np.array(indices), size, np.uint64(key)).tolist()
    assert found == [naive_permute(index, size, key) for index in indices]


def test_permute_of_an_index_does_not_depend_on_its_neighbours():
    size = 70_001
    together = permute(np.arange(size), size, KEY)
    some = np.array([69_999, 0, 17, 17, 4_242])
    np.testing.assert_array_equal(permute(some, size, KEY), together[some])
    mixed_sizes, mixed_keys = np.array([3, size, 1000]), np.array([1, int(KEY), 2], np.uint64)
    assert permute(np.array([2, 17, 999]), mixed_sizes, mixed_keys)[1] == together[17]


def test_permute_moves_indices_and_keys_change_it():
    one, other = permute(np.arange(10_000), 10_000, KEY), permute(np.arange(10_000), 10_000, KEY + np.uint64(1))
    assert (one == np.arange(10_000)).sum() < 20  # one fixed point is expected of a random permutation
    assert (one == other).sum() < 20
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.05


@PROPERTY
@given(tokens=st.lists(st.integers(0, 400), min_size=1, max_size=5), seq_len=st.integers(1, 9), seed=st.integers(0, 5))
def test_a_stream_holds_every_row_of_every_source_once_per_epoch(tokens, seq_len, seed):
    if not any(tokens):
        tokens = [*tokens, 1]
    order = Order([Source(str(number), (count,)) for number, count in enumerate(tokens)], seq_len, seed)
    expected = [
        (number, start, min(seq_len + 1, count - start))
        for number, count in enumerate(tokens)
        for start in range(0, count, seq_len)
    ]
    assert order.epoch_samples == len(expected)
    for epoch in range(2):
        rows = as_rows(order.spans(np.arange(len(expected)) + epoch * len(expected)))
        assert sorted(row[:3] for row in rows) == expected
        assert {row[3] for row in rows} == {epoch}


def test_a_stream_that_is_not_shuffled_lies_in_its_own_order():
    order = Order([Source("a", (5,)), Source("b", (4, 3))], 3, shuffle=False)
    assert as_rows(order.spans(np.arange(6))) == [
        (0, 0, 4, 0),
        (0, 3, 2, 0),
        (1, 0, 4, 0),
        (1, 3, 4, 0),
        (1, 6, 1, 0),
        (0, 0, 4, 1),
    ]


def test_epochs_are_shuffled_differently():
    order = Order([Source("a", (3000,))], 3)
    first, second = order.spans(np.arange(1000)), order.spans(np.arange(1000, 2000))
    assert (first.starts == second.starts).sum() < 20


@PROPERTY
@given(weights=WEIGHTS, seed=st.integers(0, 5))
def test_each_source_has_its_share_within_one_sample_at_every_block_boundary(weights, seed):
    order = Order([Source(str(n), (10**9,), weight) for n, weight in enumerate(weights)], 8, seed)
    blocks, shares = 3, [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    sources = order.spans(np.arange(blocks * order._block)).sources
    for samples in range(order._block, blocks * order._block + 1, order._block):
        counts = np.bincount(sources[:samples], minlength=len(weights)).tolist()
        assert sum(counts) == samples
        assert all(abs(count - samples * share) <= 1 for count, share in zip(counts, shares, strict=True))


@PROPERTY
@given(weights=WEIGHTS, block=st.integers(0, 10**9))
def test_no_source_has_a_negative_count_in_any_block(weights, block):
    order = Order([Source(str(n), (10,), weight) for n, weight in enumerate(weights)], 8)
    ends = np.array([block, block + 1]) * order._block
    counts = np.diff(np.diff(order._taken(ends), axis=0), axis=1)[0]
    assert (counts >= 0).all()
    assert counts.sum() == order._block


@PROPERTY
@given(weights=WEIGHTS, seed=st.integers(0, 5), draw=st.data())
def test_a_mixture_uses_every_row_of_a_source_at_most_once_per_epoch(weights, seed, draw):
    tokens = draw.draw(st.lists(st.integers(1, 3000), min_size=len(weights), max_size=len(weights)))
    sources = [Source(str(n), (count,), weight) for n, (count, weight) in enumerate(zip(tokens, weights, strict=True))]
    spans = Order(sources, 8, seed).spans(np.arange(1500))
    for number, source in enumerate(sources):
        rows = [row[1:] for row in as_rows(spans) if row[0] == number]
        assert len(set(rows)) == len(rows)
        assert {(start, count) for start, count, _ in rows} <= {
            (start, min(9, source.num_tokens - start)) for start in range(0, source.num_tokens, 8)
        }


def test_at_the_end_of_a_block_every_epoch_of_a_source_but_the_last_is_used_up():
    order = Order([Source("a", (80,), 1.0), Source("b", (8000,), 1.0)], 8)
    spans = order.spans(np.arange(order._block * 2))
    epochs = np.bincount(spans.epochs[spans.sources == 0])
    assert epochs.tolist() == [10] * 102 + [4]  # 1024 rows of the source's 10


@pytest.mark.parametrize("weights", [(None, None), (0.7, 0.3)])
def test_spans_of_one_sample_equal_those_of_the_batch(weights):
    order = Order([Source("a", (500, 77), weights[0]), Source("b", (1234,), weights[1])], 7, seed=3)
    samples = np.array([5, 1023, 1024, 1025, 0, 5, 9_999_999, 2_048])
    together = as_rows(order.spans(samples))
    assert together == [as_rows(order.spans(np.array([sample])))[0] for sample in samples]
    assert as_rows(order.spans(np.array([], np.int64))) == []


@pytest.mark.parametrize("weights", [(None, None), (0.7, 0.3)])
def test_the_seed_and_nothing_else_decides_the_order(weights):
    def rows(seed):
        order = Order([Source("a", (5000,), weights[0]), Source("b", (9000,), weights[1])], 7, seed)
        return as_rows(order.spans(np.arange(1500)))

    assert rows(1) == rows(1)
    assert sum(here == there for here, there in zip(rows(1), rows(2), strict=True)) < 30


@PROPERTY
@given(weights=WEIGHTS, samples=st.integers(0, 5000))
def test_rows_needed_agree_with_a_count_of_the_samples(weights, samples):
    order = Order([Source(str(n), (77,), weight) for n, weight in enumerate(weights)], 8)
    spans = order.spans(np.arange(samples))
    highest = np.zeros(len(weights), np.int64)
    for source, epoch in zip(spans.sources, spans.epochs, strict=True):
        highest[source] = max(highest[source], epoch)
    for number, (_, needed, rows, _) in enumerate(order.rows_needed(samples)):
        taken = int((spans.sources == number).sum())
        assert needed >= taken  # a block is taken in random order: some lower numbers may come after the end
        assert rows == 10
        assert not taken or (needed - 1) // rows == highest[number]


@pytest.mark.parametrize(("rows", "max_epochs", "enough"), [(100, 1.0, 100), (100, 2.5, 250), (100, 0.29, 29), (10, 1.1, 11)])
def test_shortages_begin_one_row_after_enough(rows, max_epochs, enough):
    order = Order([Source("a", (rows * 8,), max_epochs=max_epochs)], 8)
    assert order.shortages(enough) == []
    (line,) = order.shortages(enough + 1)
    assert "8 tokens are missing" in line
    assert f"takes {enough + 1:,} rows" in line


def test_a_weighted_source_runs_short_at_exactly_the_sample_that_needs_the_missing_row():
    sources = [Source("small", (8 * 700,), 1.0), Source("big", (10**9,), 1.0)]
    order = Order(sources, 8)
    spans = order.spans(np.arange(4096))
    again = np.flatnonzero((spans.sources == 0) & (spans.epochs == 1))
    assert order.shortages(int(again[0])) == []
    (line,) = order.shortages(int(again[0]) + 1)
    assert "small has 700 rows" in line


def test_the_advice_of_a_shortage_is_enough():
    order = Order([Source("a", (8 * 3001,))], 8)
    (line,) = order.shortages(3002)
    advised = float(line.split("raise max_epochs (to ")[1].split(")")[0])
    assert 1 < advised < 1.002
    assert Order([Source("a", (8 * 3001,), max_epochs=advised)], 8).shortages(3002) == []


def test_the_smallest_limit_of_a_stream_counts():
    order = Order([Source("a", (80,), max_epochs=3.0), Source("b", (80,), max_epochs=1.0)], 8)
    assert order.shortages(20) == []
    assert len(order.shortages(21)) == 1


BASE = {"sources": [Source("a", (50, 30), 1.0), Source("b", (80,), 2.0)], "seq_len": 8, "seed": 0, "shuffle": True}
CHANGES = {
    "seed": {"seed": 1},
    "seq_len": {"seq_len": 9},
    "shuffle": {"shuffle": False},
    "name": {"sources": [Source("c", (50, 30), 1.0), Source("b", (80,), 2.0)]},
    "shards": {"sources": [Source("a", (30, 50), 1.0), Source("b", (80,), 2.0)]},
    "tokens": {"sources": [Source("a", (50, 31), 1.0), Source("b", (80,), 2.0)]},
    "weight": {"sources": [Source("a", (50, 30), 1.5), Source("b", (80,), 2.0)]},
    "no weights": {"sources": [Source("a", (50, 30)), Source("b", (80,))]},
    "places": {"sources": [Source("b", (80,), 2.0), Source("a", (50, 30), 1.0)]},
    "one source less": {"sources": [Source("a", (50, 30), 1.0)]},
}


def test_the_fingerprint_changes_with_everything_that_changes_the_order():
    prints = [Order(**BASE).fingerprint, *(Order(**BASE | change).fingerprint for change in CHANGES.values())]
    for (one, first), (other, second) in itertools.combinations(zip(["base", *CHANGES], prints, strict=True), 2):
        assert first != second, (one, other)


MIXTURE_ROWS = [(0, 32, 9, 9), (1, 8, 9, 45), (1, 64, 9, 40), (0, 48, 9, 11), (1, 24, 9, 84), (1, 72, 8, 66666666678)]
STREAM_ROWS = [(1, 728, 9, 0), (1, 208, 9, 0), (1, 8, 9, 0), (1, 336, 9, 0), (1, 592, 9, 1), (1, 112, 9, 9090909090)]
FINGERPRINTS = ("520e5c30539a", "7e23b31e09a2")


def test_the_order_of_a_plan_never_changes_without_a_new_version():
    """Runs of last year must resume: whoever changes these numbers raises `version` in the fingerprint."""
    mixture, stream = Order(**BASE | {"seed": 3}), Order([Source("a", (50, 30)), Source("b", (800,))], 8, seed=5)
    assert as_rows(mixture.spans(np.array([0, 1, 2, 1023, 1024, 10**12]))) == MIXTURE_ROWS
    assert as_rows(stream.spans(np.array([0, 1, 2, 109, 110, 10**12]))) == STREAM_ROWS
    assert (mixture.fingerprint[:12], stream.fingerprint[:12]) == FINGERPRINTS


def test_the_fingerprint_is_the_same_again_and_with_other_limits():
    limited = [Source("a", (50, 30), 1.0, max_epochs=4.0), Source("b", (80,), 2.0, max_epochs=0.5)]
    assert Order(**BASE).fingerprint == Order(**BASE).fingerprint == Order(**BASE | {"sources": limited}).fingerprint


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "hold no tokens"),
        ([Source("a", ())], "hold no tokens"),
        ([Source("a", (9,), 1.0), Source("b", (9,))], "either every source has a weight or none has"),
        ([Source("a", (9,), 1.0), Source("empty", (0,), 1.0)], "'empty' holds no tokens"),
        (
            [Source("a", (9,), 1.0), Source("h", (9,), 9e-7, label="rare")],
            r"weight of rare is 9e-07 of the sum; at least 1e-06",
        ),
    ],
)
def test_sources_that_give_no_order_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        Order(sources, 8)

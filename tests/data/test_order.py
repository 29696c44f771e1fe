"""The order against naive references: a bijection, exact shares, no row twice, nothing that depends on the question."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.data.order import Order, Source, permute

PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)
KEY = np.uint64(0x1234_5678_9ABC_DEF0)
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=5)


def as_rows(spans):
    assert spans.rows.tolist() == list(range(len(spans.rows)))
    return list(zip(spans.sources.tolist(), spans.starts.tolist(), spans.counts.tolist(), strict=True))


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
        assert sorted(rows) == expected


def test_a_stream_that_is_not_shuffled_lies_in_its_own_order():
    order = Order([Source("a", (5,)), Source("b", (4, 3))], 3, shuffle=False)
    assert as_rows(order.spans(np.arange(6))) == [(0, 0, 4), (0, 3, 2), (1, 0, 4), (1, 3, 4), (1, 6, 1), (0, 0, 4)]


def test_epochs_are_shuffled_differently():
    order = Order([Source("a", (3000,))], 3)
    first, second = order.spans(np.arange(1000)), order.spans(np.arange(1000, 2000))
    assert (first.starts == second.starts).sum() < 20


def weighted(weights, tokens, **options):
    sources = [Source(str(n), (count,), weight) for n, (count, weight) in enumerate(zip(tokens, weights, strict=True))]
    return [replace(source, **options) for source in sources]


@PROPERTY
@given(weights=WEIGHTS, seed=st.integers(0, 5), draw=st.data())
def test_a_mixture_uses_every_row_of_a_source_once_before_any_again(weights, seed, draw):
    tokens = draw.draw(st.lists(st.integers(1, 3000), min_size=len(weights), max_size=len(weights)))
    rows = as_rows(Order(weighted(weights, tokens), 8, seed).spans(np.arange(1500)))
    for number, count in enumerate(tokens):
        taken = [row[1:] for row in rows if row[0] == number]
        all_rows = {(start, min(9, count - start)) for start in range(0, count, 8)}
        for begin in range(0, len(taken), len(all_rows)):
            epoch = taken[begin : begin + len(all_rows)]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= all_rows


def taken_rows(order, samples):
    return np.bincount(order.spans(samples).sources, minlength=len(order.sources)).tolist()


def test_a_phase_changes_the_weights_and_the_sources_and_loses_no_row():
    sources = weighted([0.5, 0.5, 0.0], [80_000, 80_000, 80_000])
    plain = Order(sources, 8, phases=[])
    order = Order(sources, 8, phases=[(1001, [0.2, 0.0, 0.8]), (3000, [0.0, 1.0, 0.0])])
    np.testing.assert_array_equal(order.spans(np.arange(1001)).starts, plain.spans(np.arange(1001)).starts)
    assert taken_rows(order, np.arange(1001, 3000)) == [400, 0, 1599]
    assert taken_rows(order, np.arange(3000, 3500)) == [0, 500, 0]
    rows = as_rows(order.spans(np.arange(9000)))
    assert len(set(rows)) == 9000  # no row twice
    for source, alone in enumerate([plain, plain]):  # each source's rows come in the same order as without phases
        there = [row for row in as_rows(alone.spans(np.arange(2000))) if row[0] == source]
        here = [row for row in rows if row[0] == source]
        common = min(len(here), len(there))
        assert here[:common] == there[:common]


@PROPERTY
@given(draw=st.data())
def test_the_mixture_is_within_one_sample_of_its_weights_at_every_prefix_of_every_phase(draw):
    num = draw.draw(st.integers(2, 6))
    weights = st.lists(st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.7, 1.0, 3.3]), min_size=num, max_size=num).filter(any)
    phases = draw.draw(st.lists(weights, min_size=1, max_size=4))
    starts = sorted(draw.draw(st.sets(st.integers(1, 6000), min_size=len(phases) - 1, max_size=len(phases) - 1)))
    order = Order(weighted(phases[0], [10**7] * num), 8, phases=list(zip(starts, phases[1:], strict=True)))
    sources = order.spans(np.arange(8000)).sources
    for begin, end, given_weights in zip([0, *starts], [*starts, 8000], phases, strict=True):
        for source, weight in enumerate(given_weights):
            taken = np.cumsum(sources[begin:end] == source)
            ideal = np.arange(1, end - begin + 1) * (weight / sum(given_weights))
            assert np.abs(taken - ideal).max() <= 1 + 1e-9, (begin, end, source)


def test_a_skipped_range_is_left_out_and_everything_else_stays():
    plain, order = Order(**BASE), Order(**BASE | {"skip": [(700, 720), (100, 250)]})
    kept = [n for n in range(3000) if not (100 <= n < 250 or 700 <= n < 720)]
    assert as_rows(order.spans(np.arange(len(kept)))) == as_rows(plain.spans(np.array(kept)))


@pytest.mark.parametrize("skip", [[(5, 3)], [(0, 10), (9, 12)], [(-1, 4)]])
def test_ranges_that_overlap_are_refused(skip):
    with pytest.raises(ValueError, match="overlap or are not"):
        Order(**BASE | {"skip": skip})


def test_a_source_that_ends_may_end_the_run_leave_the_mixture_or_begin_again():
    tokens = [8 * 300, 8 * 5000, 8 * 5000]
    expected = {"stop": 600, "renormalise": None, "repeat": None, "error": None}
    for at_end, end in expected.items():
        order = Order(weighted([0.5, 0.25, 0.25], tokens, at_end=at_end), 8)
        if at_end == "stop":
            assert order.end == pytest.approx(end, abs=2)
            assert taken_rows(order, np.arange(order.end))[0] == 300
            assert taken_rows(order, np.arange(order.end - 1))[0] == 299
        elif at_end == "renormalise":
            assert taken_rows(order, np.arange(2000))[0] == 300
            after = taken_rows(order, np.arange(1000, 2000))
            assert after == [0, 500, 500]
            assert order.end == 300 + 5000 + 5000  # when all are gone
            assert len(set(as_rows(order.spans(np.arange(order.end))))) == order.end
        else:
            assert taken_rows(order, np.arange(2000)) == [1000, 500, 500]
            assert order.end is None
        assert bool(order.shortages(2000)) == (at_end == "error")


def test_a_source_that_left_the_mixture_stays_out_of_later_phases():
    sources = weighted([0.5, 0.5], [8 * 100, 8 * 5000], at_end="renormalise")
    order = Order(sources, 8, phases=[(1000, [0.9, 0.1])])
    assert taken_rows(order, np.arange(3000)) == [100, 2900]


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
@given(weights=WEIGHTS, samples=st.integers(0, 5000), change=st.integers(1, 4000), skipped=st.integers(0, 300))
def test_rows_needed_agree_with_a_count_of_the_samples(weights, samples, change, skipped):
    phases, skip = [(change, weights[::-1])], [(50, 50 + skipped)] * bool(skipped)
    order = Order(weighted(weights, [77] * len(weights)), 8, phases=phases)
    used = samples + skipped if samples > 50 else samples
    expected = taken_rows(order, np.arange(used))
    assert Order(order.sources, 8, phases=phases, skip=skip).rows_needed(samples).tolist() == expected


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
    again = int(np.flatnonzero(order.spans(np.arange(4096)).sources == 0)[700])
    assert order.shortages(again) == []
    (line,) = order.shortages(again + 1)
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
    prints = [Order(**BASE).fingerprint(), *(Order(**BASE | change).fingerprint() for change in CHANGES.values())]
    for (one, first), (other, second) in itertools.combinations(zip(["base", *CHANGES], prints, strict=True), 2):
        assert first != second, (one, other)


MIXTURE_ROWS = [(1, 24, 9), (0, 40, 9), (1, 64, 9), (1, 64, 9), (0, 16, 9), (0, 24, 9)]
STREAM_ROWS = [(1, 728, 9), (1, 208, 9), (1, 8, 9), (1, 336, 9), (1, 592, 9), (1, 112, 9)]
FINGERPRINTS = ("5099b04fd2bb", "e5708f324b6d")


def test_the_order_of_a_plan_never_changes_without_a_new_version():
    """Runs of last year must resume: whoever changes these numbers raises `version` in the fingerprint."""
    mixture, stream = Order(**BASE | {"seed": 3}), Order([Source("a", (50, 30)), Source("b", (800,))], 8, seed=5)
    assert as_rows(mixture.spans(np.array([0, 1, 2, 1023, 1024, 10**12]))) == MIXTURE_ROWS
    assert as_rows(stream.spans(np.array([0, 1, 2, 109, 110, 10**12]))) == STREAM_ROWS
    assert (mixture.fingerprint()[:12], stream.fingerprint()[:12]) == FINGERPRINTS


def test_the_fingerprint_is_the_same_again_and_with_other_limits():
    limited = [Source("a", (50, 30), 1.0, max_epochs=4.0), Source("b", (80,), 2.0, max_epochs=0.5)]
    prints = {Order(**BASE).fingerprint(), Order(**BASE).fingerprint(), Order(**BASE | {"sources": limited}).fingerprint()}
    assert len(prints) == 1


LATER = {
    "a later phase": {"phases": [(500, [1.0, 1.0])]},
    "a later range": {"skip": [(500, 600)]},
    "a source for later": {"sources": [*BASE["sources"], Source("new", (90,), 0.0)], "phases": [(500, [1.0, 0.0, 4.0])]},
}


@pytest.mark.parametrize("change", LATER.values(), ids=LATER)
def test_what_comes_later_may_change_in_a_run_and_what_was_may_not(change):
    before, after = Order(**BASE), Order(**BASE | change)
    for samples in (0, 1, 499, 500):
        assert before.fingerprint(samples) == after.fingerprint(samples)
        assert as_rows(before.spans(np.arange(samples))) == as_rows(after.spans(np.arange(samples)))
    assert before.fingerprint(501) != after.fingerprint(501)
    assert before.fingerprint() != after.fingerprint()


def test_a_phase_that_a_run_has_begun_may_be_cut_but_not_changed():
    order = Order(**BASE | {"phases": [(500, [1.0, 1.0])]})
    cut = Order(**BASE | {"phases": [(500, [1.0, 1.0]), (800, [0.0, 1.0])]})
    assert order.fingerprint(800) == cut.fingerprint(800)
    assert order.fingerprint(800) != Order(**BASE | {"phases": [(500, [1.0, 2.0])]}).fingerprint(800)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "hold no tokens"),
        ([Source("a", ())], "hold no tokens"),
        ([Source("a", (9,), 1.0), Source("b", (9,))], "either every source has a weight or none has"),
        ([Source("a", (9,), 1.0), Source("empty", (0,), 1.0)], "'empty' holds no tokens"),
        (
            [Source("a", (9,), 1.0), Source("h", (9,), 9e-7, label="rare")],
            r"a weight is 9e-07 of the sum; at least 1e-06 is needed",
        ),
    ],
)
def test_sources_that_give_no_order_are_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        Order(sources, 8)

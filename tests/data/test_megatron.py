"""The order of Megatron-LM against the same rules as plain loops, document by document and sample by sample."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from franca.data.indexed import HEADER
from franca.data.megatron import MegatronOrder, Stream, blend, epochs_needed, split_boundaries

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100, print_blob=True)
LENGTHS = st.lists(st.integers(0, 12) | st.just(0) | st.integers(30, 60), min_size=1, max_size=25)
WEIGHTS = st.lists(st.floats(0.01, 100.0) | st.sampled_from([1.0, 2.0, 0.1, 0.3]), min_size=1, max_size=6)
DOCUMENTS = 304_230_423  # of tr1-13B


def naive_boundaries(shares, size):
    total = 0.0
    for share in shares:
        total += share
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / total * size))
    return [0, *(bound - (bounds[3] - size) for bound in bounds[1:])]


def naive_stream(lengths, ids, wanted, seq_len, seed, threshold):
    """The rule token by token: the order of documents, the rows as lists of (document, token in it), their places."""
    tokens = sum(lengths[document] for document in ids)
    epochs = 1
    while (epochs * tokens - 1) // seq_len < wanted:
        epochs += 1
    all_but_last = ((epochs - 1) * tokens - 1) // seq_len
    per_epoch = (tokens - 1) // seq_len
    apart = epochs > 1 and wanted - all_but_last < int(threshold * per_epoch)
    rng = np.random.RandomState(seed)

    def shuffled(values, dtype):
        values = np.array(values, dtype)
        rng.shuffle(values)
        return values.tolist()

    documents = shuffled(ids * (epochs - apart), np.int32) + (shuffled(ids, np.int32) if apart else [])
    num_rows = (epochs * tokens - 1) // seq_len
    rows, number, offset = [], 0, 0
    for _ in range(num_rows):
        row = []
        while True:
            document = documents[number]
            for token in range(offset, lengths[document]):
                row.append((document, token))
                if len(row) == seq_len + 1:
                    break
            if len(row) == seq_len + 1:
                offset = token  # which the next row begins with
                break
            number, offset = number + 1, 0
        rows.append(row)
    first = all_but_last if apart else num_rows
    places = shuffled(range(first), np.uint32) + (shuffled(range(first, num_rows), np.uint32) if apart else [])
    return SimpleNamespace(documents=documents, rows=rows, places=places, epochs=epochs, apart=apart)


def naive_blend(weights, num_samples):
    taken, found = [0] * len(weights), []
    for step in range(num_samples):
        best, largest = 0, -math.inf
        for number, weight in enumerate(weights):
            error = weight * float(max(step, 1)) - float(taken[number])
            if error > largest:
                best, largest = number, error
        found.append((best, taken[best]))
        taken[best] += 1
    return found


def naive_order(document_lengths, weights, seq_len, seed, num_samples, shares, part, threshold):
    """The rows of all samples as lists of (source, token in the source)."""
    wanted, drawn = [num_samples], [(0, sample) for sample in range(num_samples)]
    if weights is not None:
        total = 0.0
        for weight in weights:
            total += weight
        normal = [weight / total for weight in weights]
        wanted = [math.ceil(num_samples * weight * 1.005) for weight in normal]
        again = np.array(normal)
        drawn = naive_blend((again / np.sum(again)).tolist(), num_samples)
    streams, starts = [], []
    for lengths, count in zip(document_lengths, wanted, strict=True):
        bounds = naive_boundaries(shares, len(lengths))
        streams.append(naive_stream(lengths, list(range(bounds[part], bounds[part + 1])), count, seq_len, seed, threshold))
        starts.append([sum(lengths[:document]) for document in range(len(lengths))])
    return [
        [(source, starts[source][document] + token) for document, token in streams[source].rows[streams[source].places[place]]]
        for source, place in drawn
    ]


def rows_of(spans, num_rows):
    """The tokens that spans stand for, row by row."""
    rows = [[] for _ in range(num_rows)]
    assert spans.rows.tolist() == sorted(spans.rows.tolist())
    assert (spans.counts > 0).all()
    for row, source, start, count in zip(spans.rows, spans.sources, spans.starts, spans.counts, strict=True):
        rows[row] += [(int(source), token) for token in range(start, start + count)]
    return rows


def as_lengths(document_lengths):
    return [np.array(lengths, np.int32) for lengths in document_lengths]


def test_the_documents_of_tr1_are_split_as_they_were():
    assert split_boundaries("949,50,1", DOCUMENTS) == [0, 288714672, 303926193, 304230423]
    assert f"{(HEADER.size + 20 * DOCUMENTS + 8) / 2**30:.3f} GiB" == "5.667 GiB"  # its .idx: lengths, offsets, bounds


def test_the_last_of_the_three_epochs_of_tr1_stands_apart():
    tokens = 131_600_000 * 2048 + 1
    assert epochs_needed(tokens, 300_000_000, 2048, 0.80) == (3, 2)
    assert epochs_needed(tokens, 145_000_000, 2048, 0.80) == (2, 1)
    assert epochs_needed(tokens, 131_600_000, 2048, 0.80) == (1, 1)
    assert epochs_needed(tokens, 131_600_001, 2048, 0.80) == (2, 1)


@pytest.mark.parametrize(
    ("split", "size", "expected"),
    [
        ("1", 7, [0, 7, 7, 7]),
        ("3/1", 8, [0, 6, 8, 8]),
        ("0,0,5", 3, [0, 0, 0, 3]),
        ("1,1,1", 5, [0, 1, 3, 5]),
        ("1,1,1", 4, [0, 2, 3, 4]),
        ("50,50,0", 1, [0, 1, 1, 1]),
        ("0,50,50", 3, [0, -1, 1, 3]),  # both halves are rounded to even, up
    ],
)
def test_the_excess_of_rounding_is_taken_from_every_boundary(split, size, expected):
    assert split_boundaries(split, size) == expected


@PROPERTY
@given(shares=st.lists(st.floats(0, 1000), min_size=3, max_size=3).filter(any), size=st.integers(1, 10**9))
def test_boundaries_agree_with_the_naive_rule(shares, size):
    assert split_boundaries("/".join(map(repr, shares)), size) == naive_boundaries(shares, size)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan", "inf,1", "949;50;1"])
def test_what_is_no_split_is_refused(split):
    with pytest.raises(ValueError, match=r"cannot be read. Give up to three numbers"):
        split_boundaries(split, 10)


@PROPERTY
@example(lengths=[0, 0, 5, 0, 4, 0], wanted=7, seq_len=3, seed=0, threshold=0.8)  # empty documents at both ends
@example(lengths=[40], wanted=30, seq_len=3, seed=1, threshold=0.95)  # one document, many rows
@given(
    lengths=LENGTHS,
    wanted=st.integers(0, 150),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    threshold=st.sampled_from([0.0, 0.5, 0.80, 0.95, 1.0]),
)
def test_a_stream_is_the_naive_stream(lengths, wanted, seq_len, seed, threshold):
    lengths[0] += max(0, seq_len + 1 - sum(lengths))
    naive = naive_stream(lengths, list(range(len(lengths))), wanted, seq_len, seed, threshold)
    epochs, together = epochs_needed(sum(lengths), wanted, seq_len, threshold)
    assert (epochs, together) == (naive.epochs, naive.epochs - naive.apart)
    lengths = np.array(lengths, np.int32)
    stream = Stream(lengths, seq_len, Stream.columns(lengths, 0, len(lengths), epochs, together, seq_len, seed))
    assert stream.documents.tolist() == naive.documents
    assert stream.shuffle.tolist() == naive.places


def rows_of_one_source(lengths, num_samples, **more):
    order = MegatronOrder(["a"], as_lengths([lengths]), None, 4, 3, num_samples, "1", **more)
    return order, rows_of(order.spans(np.arange(num_samples)), num_samples)


@pytest.mark.parametrize(
    ("wanted", "epochs", "apart"),
    [(10, 1, False), (17, 2, True), (18, 2, False), (27, 3, True), (28, 3, False), (99, 10, True), (100, 10, False)],
)
def test_both_sides_of_the_threshold(wanted, epochs, apart):
    lengths = [3, 0, 11, 1, 0, 0, 6, 20]  # 41 tokens: 10 rows of 4 in an epoch
    assert epochs_needed(41, wanted, 4, 0.80) == (epochs, epochs - apart)
    _, rows = rows_of_one_source(lengths, wanted)
    assert rows == naive_order([lengths], None, 4, 3, wanted, [1, 0, 0], 0, 0.80)


def test_the_later_threshold_gives_another_order():
    lengths = list(range(60))
    early, late = rows_of_one_source(lengths, 850)[1], rows_of_one_source(lengths, 850, last_epoch_threshold=0.95)[1]
    assert early != late
    assert late == naive_order([lengths], None, 4, 3, 850, [1, 0, 0], 0, 0.95)


@PROPERTY
@given(
    document_lengths=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=WEIGHTS,
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 1000),
    num_samples=st.integers(1, 120),
    part=st.integers(0, 2),
    threshold=st.sampled_from([0.80, 0.95]),
    blended=st.booleans(),
)
def test_every_row_has_the_tokens_of_the_naive_order(
    document_lengths, weights, seq_len, seed, num_samples, part, threshold, blended
):
    shares = [3.0, 2.0, 2.0]
    weights = (weights * 4)[: len(document_lengths)] if blended or len(document_lengths) > 1 else None
    for lengths in document_lengths:  # so that every part has a sample
        lengths += [1] * max(0, 4 - len(lengths))
        begin, end = naive_boundaries(shares, len(lengths))[part : part + 2]
        lengths[begin] += max(0, seq_len + 1 - sum(lengths[begin:end]))
    names = [f"corpus {number}" for number in range(len(document_lengths))]
    where = ("train", "validation", "test")[part]
    order = MegatronOrder(names, as_lengths(document_lengths), weights, seq_len, seed, num_samples, "3,2,2", where, threshold)
    expected = naive_order(document_lengths, weights, seq_len, seed, num_samples, shares, part, threshold)
    assert rows_of(order.spans(np.arange(num_samples)), num_samples) == expected
    asked = np.random.default_rng(seed).integers(0, num_samples, 20)  # in any order, some twice
    assert rows_of(order.spans(asked), 20) == [expected[sample] for sample in asked]


def test_a_row_begins_with_the_last_token_of_the_row_before():
    order, _ = rows_of_one_source([9, 0, 14, 5, 30], 20)
    (stream,) = order.streams
    rows = rows_of(order.spans(np.argsort(stream.shuffle)), len(stream.shuffle))
    assert all(here[-1] == there[0] for here, there in itertools.pairwise(rows))
    assert {len(row) for row in rows} == {5}


@PROPERTY
@example(weights=[1.0, 1.0], num_samples=5000)
@example(weights=[1.0] * 6, num_samples=5000)
@example(weights=[1e-7, 0.1, 0.2, 0.7], num_samples=20_000)
@example(weights=[1e-4] * 20 + [0.3, 0.7], num_samples=20_000)
@given(weights=WEIGHTS, num_samples=st.integers(0, 5000))
def test_blending_in_lanes_is_the_greedy_rule_step_by_step(weights, num_samples):
    normal = np.array(weights) / np.sum(weights)
    assert blend(normal, num_samples).tolist() == [source for source, _ in naive_blend(normal.tolist(), num_samples)]


@pytest.mark.parametrize("seed", range(4))
def test_many_sources_of_very_different_weights_are_blended_by_the_rule(seed):
    weights = np.random.default_rng(seed).dirichlet(np.full(30, 0.2))
    assert blend(weights, 30_000).tolist() == [source for source, _ in naive_blend(weights.tolist(), 30_000)], seed


def test_no_sample_of_a_blend_lies_behind_the_end_of_its_stream():
    for num_samples in range(1, 60):
        order = MegatronOrder("abc", as_lengths([[6]] * 3), [0.2, 0.5, 0.3], 5, 0, num_samples, "1")
        assert len(order.spans(np.arange(num_samples)).rows) >= num_samples


def test_one_source_with_a_weight_is_made_longer_than_one_without():
    lengths = as_lengths([[5] * 1000])
    without, with_one = (MegatronOrder("a", lengths, weights, 4, 0, 1249, "1") for weights in (None, [2.0]))
    assert len(without.streams[0].shuffle) == without.epoch_samples == 1249
    assert len(with_one.streams[0].shuffle) == 2499  # ceil(1249 * 1.005) is more than an epoch


def test_an_epoch_is_one_pass_over_the_split_of_every_source():
    order = MegatronOrder("ab", as_lengths([[7] * 10, [9] * 20]), [1, 2], 4, 0, 5, "8,1,1")
    assert order.epoch_samples == (8 * 7 - 1) // 4 + (16 * 9 - 1) // 4
    assert order.seq_len == 4


def test_three_hundred_thousand_documents_and_six_million_samples():
    """int64 throughout: the tokens of one source are more than an int32 counts."""
    rng = np.random.default_rng(0)
    lengths = as_lengths([rng.integers(0, 20_000, 300_000), rng.integers(0, 500, 20_000)])
    order = MegatronOrder("ab", lengths, [0.9, 0.1], 2048, 1234, 6_000_000)
    assert lengths[0].sum(dtype=np.int64) > 2**31
    samples = np.concatenate([np.arange(1000), np.arange(5_999_000, 6_000_000)])
    spans = order.spans(samples)
    np.testing.assert_array_equal(np.bincount(spans.rows, spans.counts), np.full(2000, 2049))
    assert np.bincount(spans.sources[spans.counts.cumsum() % 2049 == 0]).tolist() == [1800, 200]
    assert spans.starts.max() > 2**31
    ends = [int(part[: split_boundaries("949,50,1", len(part))[1]].sum(dtype=np.int64)) for part in lengths]
    assert (spans.starts + spans.counts <= np.array(ends)[spans.sources]).all()


def test_spans_of_nothing():
    order, _ = rows_of_one_source([9, 9], 3)
    assert len(order.spans(np.array([], np.int64)).rows) == 0


BASE = {
    "names": ["a", "b"],
    "document_lengths": as_lengths([[9] * 50, [8] * 50]),
    "weights": [1.0, 2.0],
    "seq_len": 8,
    "seed": 0,
    "num_samples": 160,
    "split": "8,1,1",
}
CHANGES = {
    "names": {"names": ["a", "c"]},
    "places": {"names": ["b", "a"]},
    "lengths": {"document_lengths": as_lengths([[9] * 50, [8] * 48 + [7, 9]])},
    "a document more": {"document_lengths": as_lengths([[9] * 49, [9] + [8] * 50])},
    "weights": {"weights": [2.0, 1.0]},
    "seq_len": {"seq_len": 7},
    "seed": {"seed": 1},
    "more epochs": {"num_samples": 300},
    "threshold": {"last_epoch_threshold": 0.1},
    "split": {"split": "7,2,1"},
    "part": {"part": "validation"},
}


def test_the_fingerprint_changes_with_everything_that_changes_the_order():
    prints = {name: MegatronOrder(**BASE | change).fingerprint() for name, change in {"base": {}, **CHANGES}.items()}
    assert len(set(prints.values())) == len(prints), prints
    one = BASE | {"names": ["a"], "document_lengths": BASE["document_lengths"][:1]}
    assert MegatronOrder(**one | {"weights": None}).fingerprint() != MegatronOrder(**one | {"weights": [1.0]}).fingerprint()


SAME = [{"weights": [2, 4]}, {"split": "80/10/10"}, {"num_samples": 159}, {"last_epoch_threshold": 0.81}]


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_does_not_change_the_order_does_not_change_the_fingerprint(change):
    one, other = MegatronOrder(**BASE), MegatronOrder(**BASE | change)
    assert one.fingerprint() == other.fingerprint()
    assert rows_of(one.spans(np.arange(159)), 159) == rows_of(other.spans(np.arange(159)), 159)


def test_wide_lengths_are_the_same_lengths():
    wide = [lengths.astype(np.int64) for lengths in BASE["document_lengths"]]
    assert MegatronOrder(**BASE | {"document_lengths": wide}).fingerprint() == MegatronOrder(**BASE).fingerprint()


def test_a_run_of_more_samples_than_the_order_was_made_for_is_short():
    order = MegatronOrder(**BASE)
    assert order.shortages(160) == []
    (line,) = order.shortages(1161)
    assert "takes 1,161 samples, but this order was made for 160" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "no weights for 2 sources: give each a weight"),
        ({"weights": [1.0]}, "1 weights for 2 sources"),
        ({"weights": [1.0, 0.0]}, r"weights are \[1.0, 0.0\]; each must be above 0"),
        ({"weights": [1.0, math.nan]}, "each must be above 0"),
        ({"part": "valid"}, "no part 'valid'; its parts are train, validation, test"),
        ({"split": "8,2", "part": "test"}, r"split 8,2 leaves no documents of a \(which has 50\) for test"),
        ({"document_lengths": as_lengths([[9] * 50, [9] * 3]), "split": "0,50,50", "part": "validation"}, "documents of b"),
        ({"split": "eight"}, "split 'eight' cannot be read"),
        ({"seq_len": 320}, "train part of b has 320 tokens; one sample needs 321"),
    ],
)
def test_what_gives_no_order_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MegatronOrder(**BASE | change)


PINNED = {
    0: (1, [62, 73, 74, 75, 76, 77, 52, 53, 54]),
    1: (0, [157, 158, 133, 134, 135, 136, 137, 138, 139]),
    80: (1, [37, 38, 39, 40, 41, 111, 112, 113, 114]),
    159: (0, [189, 190, 191, 123, 124, 125, 126, 127, 128]),
}


def test_the_rows_are_those_of_megatron_itself():
    """What the code of tr1-13B, compiled and run, gave for these lengths: source and tokens of some samples."""
    lengths = as_lengths([np.arange(50) % 13, np.arange(60) % 7])
    order = MegatronOrder("ab", lengths, [1.0, 2.0], 8, 1234, 160, "8,1,1")
    expected = [[(source, token) for token in tokens] for source, tokens in PINNED.values()]
    assert rows_of(order.spans(np.array(list(PINNED))), len(PINNED)) == expected


def columns_of(order):
    return [column.tolist() for column in vars(order.spans(np.arange(order.num_samples))).values()]


def test_the_index_is_built_once_and_mapped_by_everyone_else(tmp_path, monkeypatch):
    lengths = as_lengths([[3, 0, 11, 1, 9, 0, 6, 20], [7] * 9])

    def order(**more):
        return MegatronOrder(["a", "b"], lengths, [0.3, 0.7], 4, 3, 200, "1", **more)

    expected = columns_of(order())
    assert columns_of(order(cache=tmp_path / "index")) == expected
    monkeypatch.setattr(Stream, "columns", lambda *arguments: pytest.fail("built a second time"))
    again = order(cache=tmp_path / "index")
    assert columns_of(again) == expected
    assert all(isinstance(stream.documents, np.memmap) for stream in again.streams)
    monkeypatch.undo()
    other = MegatronOrder(["a", "b"], lengths, [0.3, 0.7], 4, 4, 200, "1", cache=tmp_path / "index")
    assert columns_of(other) != expected


def test_an_index_that_was_cut_short_is_built_again(tmp_path):
    lengths = as_lengths([[3, 0, 11, 1, 9, 0, 6, 20]])
    whole = columns_of(MegatronOrder(["a"], lengths, None, 4, 3, 50, "1", cache=tmp_path))
    next(tmp_path.glob("*.count")).unlink()  # which is written last
    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:90])
    assert columns_of(MegatronOrder(["a"], lengths, None, 4, 3, 50, "1", cache=tmp_path)) == whole

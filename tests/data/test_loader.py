"""Every token once per epoch, on any number of ranks, and rows that agree with a naive loop."""

import hashlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.config import check
from franca.core.duration import Duration
from franca.core.errors import ConfigError
from franca.core.schedule import Stage, Timeline
from franca.data.loader import IGNORE, DataConfig, Loader, PhaseConfig, SourceConfig, open_plan, validation_sets
from franca.data.order import Order, Source

PROPERTY = settings(derandomize=True, deadline=None, max_examples=15)
WORLDS = (1, 2, 3, 5, 8)
LENGTHS = st.lists(st.integers(0, 23), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 0)


def number_documents(lengths, first=1):
    """Documents of the given lengths whose token ids count up from `first`: no id occurs twice, none is the padding 0."""
    ids = iter(range(first, first + sum(lengths)))
    return [[next(ids) for _ in range(length)] for length in lengths]


def split_documents(documents, num_shards):
    return [documents[len(documents) * k // num_shards : len(documents) * (k + 1) // num_shards] for k in range(num_shards)]


def make_source(shards, name="a", **facts):
    return Source(name, tuple(shard.num_tokens for shard in shards), **facts)


def make_loader(shards, seq_len, batch=4, epochs=1, attention="causal", **order):
    order = Order([make_source(shards)], seq_len, **order)
    timeline = Timeline((Stage(0, 0, batch),), seq_len, order.epoch_samples)
    loader = Loader(order, [shards], timeline, epochs * order.epoch_samples, attention)
    return loader, timeline.steps(Duration(epochs, "epochs"))


def real_rows(loader, step, rank, world):
    """A rank's slice of a batch; all ranks have as many rows, and those that fill up hold nothing."""
    count, batch = loader.timeline.batch_samples(step), loader.batch(step, rank, world)
    mine = count * (rank + 1) // world - count * rank // world
    assert len(batch.tokens_BT) == -(-count // world)
    assert (batch.targets_BT[mine:] == IGNORE).all()
    return batch.part(0, mine)


def read_everything(loader, steps, world):
    batches = [real_rows(loader, step, rank, world) for step in range(steps) for rank in range(world)]
    return np.concatenate([b.tokens_BT for b in batches]), np.concatenate([b.targets_BT for b in batches])


def count_seen(tokens, targets):
    """How often each id was an input and a valid target. Id 0 is padding here."""
    return Counter(tokens[tokens != 0].tolist()), Counter(targets[targets != IGNORE].tolist())


@pytest.mark.parametrize("num_shards", [1, 3, 7])
@PROPERTY
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), batch=st.integers(1, 11), seed=st.integers(0, 9))
def test_every_token_is_seen_once_per_epoch_on_any_world(write_shards, num_shards, lengths, seq_len, batch, seed):
    documents = number_documents(lengths)
    total = sum(lengths)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), split_documents(documents, num_shards))
        loader, steps = make_loader(shards, seq_len, batch, seed=seed)
        everything = [read_everything(loader, steps, world) for world in WORLDS]
    for tokens, targets in everything:
        inputs, valid = count_seen(tokens, targets)
        assert inputs == Counter(range(1, total + 1))
        assert valid == Counter(range(2, total + 1))  # nothing comes before the first token, so nothing predicts it
        np.testing.assert_array_equal(tokens, everything[0][0])  # ranks only cut the same rows differently
        np.testing.assert_array_equal(targets, everything[0][1])


@PROPERTY
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), batch=st.integers(1, 11), epochs=st.integers(2, 3))
def test_every_token_is_seen_once_more_in_every_further_epoch(write_shards, lengths, seq_len, batch, epochs):
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), split_documents(number_documents(lengths), 3))
        loader, steps = make_loader(shards, seq_len, batch, epochs)
        inputs, valid = count_seen(*read_everything(loader, steps, 2))
    assert inputs == dict.fromkeys(range(1, sum(lengths) + 1), epochs)
    assert valid == dict.fromkeys(range(2, sum(lengths) + 1), epochs)


@PROPERTY
@given(first=LENGTHS, second=LENGTHS, seq_len=st.integers(1, 9))
def test_unweighted_sources_are_each_seen_once_and_never_run_into_each_other(write_shards, first, second, seq_len):
    documents = number_documents(first + second)
    groups = split_documents(documents[: len(first)], 2), split_documents(documents[len(first) :], 3)
    with tempfile.TemporaryDirectory() as folder:
        shards = [write_shards(Path(folder) / str(number), group) for number, group in enumerate(groups)]
        order = Order([make_source(group, name) for name, group in zip("ab", shards, strict=True)], seq_len)
        loader = Loader(order, shards, Timeline((), seq_len, order.epoch_samples), order.epoch_samples)
        batch = loader.rows(0, order.epoch_samples)
    inputs, valid = count_seen(batch.tokens_BT, batch.targets_BT)
    assert inputs == Counter(range(1, sum(first + second) + 1))
    assert valid == Counter(range(1, sum(first + second) + 1)) - Counter([1, sum(first) + 1])


def naive_row(documents, start, seq_len):
    """One row with document attention, token by token: (tokens, targets, documents, positions), unpadded."""
    stream = [(token, number, place) for number, doc in enumerate(documents) for place, token in enumerate(doc)]
    row, after = stream[start : start + seq_len], stream[start + 1 : start + seq_len + 1]
    tokens = [token for token, _, _ in row]
    same = [here[1] == there[1] for here, there in zip(row, after, strict=False)]
    targets = [there[0] if together else IGNORE for together, there in zip(same, after, strict=False)]
    targets += [IGNORE] * (len(tokens) - len(targets))
    numbers, positions = [], []
    for index, (_, _, place) in enumerate(row):
        begins = place == 0
        numbers.append((numbers[-1] if numbers else 0) + begins)
        positions.append(0 if begins or index == 0 else positions[-1] + 1)
    return tokens, targets, numbers, positions


@pytest.mark.parametrize("num_shards", [1, 3, 7])
@PROPERTY
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_document_attention_agrees_with_a_naive_loop(write_shards, num_shards, lengths, seq_len):
    documents = number_documents(lengths)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), split_documents(documents, num_shards))
        loader, _ = make_loader(shards, seq_len, attention="document", shuffle=False)
        batch = loader.rows(0, loader.order.epoch_samples)
    assert len(batch.tokens_BT) == -(-sum(lengths) // seq_len)
    for row in range(len(batch.tokens_BT)):
        found = batch.tokens_BT[row], batch.targets_BT[row], batch.document_BT[row], batch.position_BT[row]
        expected = naive_row(documents, row * seq_len, seq_len)
        filled = len(expected[0])
        assert [array[:filled].tolist() for array in found] == list(expected)
        assert (batch.targets_BT[row, filled:] == IGNORE).all()


def test_document_attention_changes_no_token_and_masks_exactly_the_first_token_of_each_document(write_shards, tmp_path):
    documents = number_documents([5, 0, 3, 0, 0, 9, 1, 4])
    shards = write_shards(tmp_path, split_documents(documents, 3))
    causal, steps = make_loader(shards, 4)
    document, _ = make_loader(shards, 4, attention="document")
    (tokens, targets), (same_tokens, masked) = read_everything(causal, steps, 1), read_everything(document, steps, 1)
    np.testing.assert_array_equal(tokens, same_tokens)
    np.testing.assert_array_equal(masked, np.where(np.isin(targets, [doc[0] for doc in documents if doc]), IGNORE, targets))


def test_causal_rows_have_no_documents_and_count_their_valid_targets(write_shards, tmp_path):
    loader, _ = make_loader(write_shards(tmp_path, [[range(1, 8)]]), 4, shuffle=False)
    batch = loader.rows(0, 2)
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.targets_BT.tolist() == [[2, 3, 4, 5], [6, 7, IGNORE, IGNORE]]
    assert (batch.document_BT, batch.position_BT, batch.num_valid) == (None, None, 6)


def test_parts_of_a_batch_are_its_rows(write_shards, tmp_path):
    for attention in ("causal", "document"):
        loader, _ = make_loader(write_shards(tmp_path, [[range(1, 30)]]), 4, attention=attention)
        whole, part, rows = loader.rows(0, 6), loader.rows(0, 6).part(2, 3), loader.rows(2, 3)
        for name in ("tokens_BT", "targets_BT", "document_BT", "position_BT"):
            np.testing.assert_array_equal(getattr(part, name), getattr(rows, name))
        assert part.num_valid == whole.part(2, 3).num_valid == rows.num_valid


def test_rows_from_stop_on_are_empty_and_masked(write_shards, tmp_path):
    loader, _ = make_loader(write_shards(tmp_path, [[range(1, 41)]]), 4, attention="document")
    batch = loader.rows(8, 4)
    assert (batch.targets_BT[:2] != IGNORE).any(axis=1).all()
    assert not batch.tokens_BT[2:].any()
    assert (batch.targets_BT[2:] == IGNORE).all()
    assert loader.rows(100, 3).num_valid == 0


def test_a_batch_ramp_takes_the_same_rows_as_a_fixed_batch(write_shards, tmp_path):
    loader, steps = make_loader(write_shards(tmp_path, [[range(1, 158)]]), 4, batch=8)
    ramped = Loader(
        loader.order, loader.shards, Timeline((Stage(0, 0, 2), Stage(3, 6, 5)), 4, loader.order.epoch_samples), loader.stop
    )
    plain, ramp = read_everything(loader, steps, 3)[0], read_everything(ramped, 11, 2)[0]
    np.testing.assert_array_equal(ramp[:40], plain[:40])
    assert len(ramp) == 3 * 2 + 8 * 5


@pytest.mark.parametrize("depth", [1, 2, 5, 50])
def test_reading_ahead_gives_the_same_batches_in_order(write_shards, tmp_path, depth):
    loader, steps = make_loader(write_shards(tmp_path, [[range(1, 158)]]), 4)
    ahead = list(loader.ahead(range(2, steps), 1, 2, depth))
    assert len(ahead) == steps - 2
    for step, batch in enumerate(ahead, 2):
        np.testing.assert_array_equal(batch.tokens_BT, loader.batch(step, 1, 2).tokens_BT)


def test_reading_ahead_can_be_left_in_the_middle_and_passes_errors_on(write_shards, tmp_path):
    shards = write_shards(tmp_path, [[range(1, 158)]])
    loader, steps = make_loader(shards, 4)
    stream = loader.ahead(range(steps), 0, 1)
    np.testing.assert_array_equal(next(stream).tokens_BT, loader.batch(0, 0, 1).tokens_BT)
    stream.close()
    shards[0].bin_path.unlink()
    fresh, _ = make_loader([type(shards[0])(shard.prefix) for shard in write_shards(tmp_path, [[range(1, 158)]])], 4)
    shards[0].bin_path.unlink()  # opened, but not yet mapped
    with pytest.raises(FileNotFoundError):
        next(fresh.ahead(range(steps), 0, 1))


def make_dataset(write_shards, root, sources, sha256="one", vocab_size=300):
    """A dataset folder of `{source: (training documents, held-out documents)}`."""
    entries = {}
    for name, splits in sources.items():
        entries[name] = {}
        for split, documents in zip(("train", "validation"), splits, strict=True):
            shards = write_shards(root / split / name, [documents]) if documents else []
            hashes = [hashlib.sha256(s.bin_path.read_bytes() + s.idx_path.read_bytes()).hexdigest() for s in shards]
            facts = [{"name": s.prefix.name, "tokens": s.num_tokens, "sha256": h} for s, h in zip(shards, hashes, strict=True)]
            entries[name][split] = {"shards": facts, "tokens": sum(map(len, documents))}
    tokenizer = {"sha256": sha256, "vocab_size": vocab_size, "bos": None, "eos": 7}
    manifest = {"tokenizer": tokenizer, "sources": entries}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return str(root)


def test_a_plan_opens_every_source_of_every_dataset(write_shards, tmp_path):
    one = make_dataset(write_shards, tmp_path / "one", {"x": ([[1, 2, 3]], [[9, 9]]), "y": ([[4, 5]], [])})
    two = make_dataset(write_shards, tmp_path / "two", {"x": ([[6, 7, 8, 9]], [[3]])})
    data = DataConfig(sources=(SourceConfig(path=one), SourceConfig(path=two)), seq_len=4)
    plan = open_plan(data)
    assert plan.tokenizer == {"sha256": "one", "vocab_size": 300, "bos": None, "eos": 7}
    assert [source.num_tokens for source in plan.order.sources] == [5, 4]
    sets = validation_sets(plan, data)
    assert {label: loader.rows(0, 1).tokens_BT[0].tolist() for label, (loader, _) in sets.items()} == {
        "x": [9, 9, 0, 0],
        f"{two}/x": [3, 0, 0, 0],
    }
    assert sets["x"][1]["tokens"] == 2


def test_everything_wrong_with_the_data_settings_is_said_at_once():
    values = {"sources": [{"path": "a", "weight": -1.0}, {"path": "b", "max_epochs": 0.0}], "seq_len": 0}
    with pytest.raises(ConfigError) as caught:
        check(DataConfig, values, "data")
    message = str(caught.value)
    assert "3 problems" in message
    for part in (
        "seq_len: input should be greater than or equal to 1, got 0",
        "sources[0].weight: ",
        "sources[1].max_epochs: ",
    ):
        assert part in message
    assert "input should be greater than or equal to 0, got -1.0" in message
    assert "input should be greater than 0, got 0.0" in message


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ConfigError, match=rf"sources\[0\]\.weight: input should be .*, got {weight}"):
        check(DataConfig, {"sources": [{"path": "a", "weight": weight}]}, "data")


def test_weights_for_some_sources_only_are_refused(write_shards, tmp_path):
    one = make_dataset(write_shards, tmp_path / "one", {"x": ([[1, 2, 3]], [])})
    with pytest.raises(ConfigError, match=r"data\.sources: either every source has a weight or none has"):
        open_plan(DataConfig(sources=(SourceConfig(path=one, weight=1.0), SourceConfig(path=one))))


def plan_of(*paths, **facts):
    return open_plan(DataConfig(sources=tuple(SourceConfig(path=str(path), **facts) for path in paths), seq_len=2))


def first_rows(plan, count=6):
    return Loader(plan.order, plan.shards, Timeline((), 2, 9), 99).rows(0, count).tokens_BT.tolist()


@pytest.mark.parametrize("weight", [None, 1.0])
def test_a_dataset_may_be_renamed_but_not_replaced_by_other_content(write_shards, tmp_path, weight):
    documents = number_documents([4, 5, 6])
    other = [[9, *documents[0][1:]], *documents[1:]]
    cut_elsewhere = number_documents([5, 4, 6])
    paths = [tmp_path / name for name in ("here", "moved/there", "other", "cut", "second")]
    for path, content in zip(paths, [documents, documents, other, cut_elsewhere, [[7] * 9]], strict=True):
        make_dataset(write_shards, path, {"x": (content, [])})
    here, there, changed, cut = (plan_of(path, paths[4], weight=weight) for path in paths[:4])
    assert here.order.fingerprint() == there.order.fingerprint()
    assert first_rows(here) == first_rows(there)
    assert len({plan.order.fingerprint() for plan in (here, changed, cut)}) == 3


def test_shortages_name_the_folder(write_shards, tmp_path):
    make_dataset(write_shards, tmp_path / "one", {"x": (number_documents([4]), [])})
    (line,) = plan_of(tmp_path / "one").order.shortages(100)
    assert f"{tmp_path}/one has 2 rows" in line


@pytest.fixture
def two(write_shards, tmp_path):
    """Settings for two datasets: `one` of 60 tokens and `two` of 6,000."""
    for name, count in (("one", 60), ("two", 6000)):
        make_dataset(write_shards, tmp_path / name, {"x": (number_documents([count]), [])})

    def settings(weights=(None, None), **changes):
        sources = tuple(SourceConfig(path=str(tmp_path / n), weight=w) for n, w in zip(("one", "two"), weights, strict=True))
        return DataConfig(**{"sources": sources, "seq_len": 2} | changes)

    return settings


def shares(plan, samples):
    return np.bincount(plan.order.spans(np.array(samples)).sources, minlength=2).tolist()


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1 / 101), (2.0, 1 / 11), (1e9, 0.5)])
def test_a_temperature_makes_weights_of_the_tokens(two, temperature, share):
    assert shares(open_plan(two(temperature=temperature)), range(2020))[0] == pytest.approx(2020 * share, abs=1)


def test_phases_name_sources_and_begin_at_samples_or_tokens(two):
    starts = [Duration.parse("100 samples"), Duration.parse("400 tokens")]
    phases = tuple(PhaseConfig(start=s, weights=w) for s, w in zip(starts, [{"two": 1.0}, {"one": 3, "two": 1}], strict=True))
    plan = open_plan(two(weights=(1.0, 1.0), phases=phases))
    assert [shares(plan, range(*span)) for span in ((0, 100), (100, 200), (200, 300))] == [[50, 50], [0, 100], [75, 25]]


def phase(start, **weights):
    return (PhaseConfig(start=Duration.parse(start), weights=weights),)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ((None, None), {"phases": phase("9 samples", one=1.0)}, "phases need weights"),
        ((1.0, 1.0), {"phases": phase("9 samples", three=1.0)}, "there is no source three, only one, two"),
        ((1.0, 1.0), {"phases": phase("9 steps", one=1.0)}, r"phases\[0\].start: is '9 steps'; give samples or tokens"),
        ((1.0, 1.0), {"phases": phase("9 samples", one=0.0)}, "one must be above zero"),
        ((1.0, 1.0), {"phases": phase("9 samples", one=1.0) + phase("8 samples", one=1.0)}, "a start after the phase before"),
        ((1.0, 1.0), {"temperature": 2.0}, "not both"),
        ((0.0, 0.0), {}, "one must be above zero"),
        ((None, None), {"skip": ((5, 2),)}, "skip: the ranges"),
    ],
)
def test_data_that_does_not_go_together_is_refused(two, weights, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_plan(two(weights=weights, **changes))


def test_no_source_at_all_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sources: the sources \[\] hold no tokens"):
        open_plan(DataConfig(sources=()))


def test_datasets_of_different_tokenizers_are_refused(write_shards, tmp_path):
    one = make_dataset(write_shards, tmp_path / "one", {"x": ([[1]], [])})
    two = make_dataset(write_shards, tmp_path / "two", {"x": ([[1]], [])}, sha256="other")
    with pytest.raises(ConfigError, match="different tokenizers"):
        open_plan(DataConfig(sources=(SourceConfig(path=one), SourceConfig(path=two))))


def test_a_dataset_without_tokens_is_refused(write_shards, tmp_path):
    path = make_dataset(write_shards, tmp_path / "one", {"x": ([[]], [])})
    with pytest.raises(ConfigError, match="hold no tokens"):
        open_plan(DataConfig(sources=(SourceConfig(path=path),)))

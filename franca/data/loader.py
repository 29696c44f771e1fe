"""From a step and a rank to a batch of numbers. It has no state: the step says everything.

What it refuses to know: devices, models, epochs, mixtures (those are the order's).
"""

import bisect
import resource
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from franca.core.config import Choice, Count, NotNegative, Positive, Share, config
from franca.core.duration import Duration
from franca.core.errors import ConfigError
from franca.core.schedule import Timeline
from franca.data.indexed import BareShard, Dataset, Shard
from franca.data.megatron import MegatronOrder
from franca.data.order import AtEnd, Order, Source
from franca.data.tokenizer import Tokenizer

IGNORE = -100  # the target of a position that is not trained on

Rows = NDArray[np.int64]
Attention = Literal["causal", "document"]


@config
class SourceConfig:
    """One prepared dataset folder, or one `.bin/.idx` pair of Megatron-LM or datatrove (its path without suffix)."""

    path: str
    tokenizer: str | None = None  # of such a pair: the tokenizer.json that it was made with
    name: str | None = None  # what `phases` and messages call it; None: the folder's name
    weight: NotNegative | None = None  # its share of the samples; leave it out everywhere to take all rows alike
    max_epochs: Positive = 1.0
    at_end: AtEnd = "error"  # when max_epochs are over: refuse the run, end it, go on without this source, or repeat it


class OrderConfig(Choice):
    """The open choice `data.order`."""


@config
class ShuffledConfig(OrderConfig):
    """Our own order: rows at random within a source, sources mixed exactly."""

    kind: Literal["shuffled"] = "shuffled"


@config
class Megatron2021Config(OrderConfig):
    """The order of Megatron-LM of 2021, sample by sample; `samples` is what the run was made for, and decides the order."""

    kind: Literal["megatron-2021"]
    samples: Count
    split: str = "949,50,1"
    part: Literal["train", "validation", "test"] = "train"
    last_epoch_threshold: Share = 0.80  # 0.95 in later versions of Megatron-DeepSpeed
    cache: str | None = None  # a folder where the index (14 GB for tr1-13B) is built once, and mapped by all ranks


@config
class PhaseConfig:
    """From `start` on (samples or tokens, skipped ones counted), other weights: a source that is not named has none."""

    start: Duration
    weights: dict[str, NotNegative]


@config
class DataConfig:
    """What is trained on. `attention: document` keeps documents of one row from seeing each other."""

    sources: tuple[SourceConfig, ...]
    seq_len: Count = 2048  # tokens per row
    attention: Attention = "causal"
    seed: int = 0
    temperature: Positive | None = None  # instead of weights: each source's rows to the power of 1 / temperature
    phases: tuple[PhaseConfig, ...] = ()
    order: OrderConfig = ShuffledConfig()
    skip: tuple[tuple[int, int], ...] = ()  # ranges [first, last) of samples that are left out, after a loss spike for instance


@dataclass(frozen=True)
class Batch:
    """Rows of numbers. B rows, T = seq_len positions; every array is (B, T) int64.

    `targets_BT` is the next token, or IGNORE past the end of a source (and, with document attention, of a document).
    `document_BT` numbers the documents of a row and `position_BT` counts within them; both None with causal attention.
    """

    tokens_BT: Rows
    targets_BT: Rows
    document_BT: Rows | None
    position_BT: Rows | None

    @property
    def num_valid(self) -> int:
        return int(np.count_nonzero(self.targets_BT != IGNORE))

    def part(self, first: int, count: int) -> "Batch":
        """The rows [first, first + count), as views."""
        rows: dict[str, Any] = {name: None if a is None else a[first : first + count] for name, a in vars(self).items()}
        return Batch(**rows)


class Loader:
    """Rows by number. `shards[s]` are the shards of the order's source s; samples from `stop` on are empty rows."""

    def __init__(
        self,
        order: Order | MegatronOrder,
        shards: Sequence[Sequence[Shard]],
        timeline: Timeline,
        stop: int,
        attention: Attention = "causal",
    ) -> None:
        self.order, self.shards, self.timeline, self.stop = order, shards, timeline, stop
        self.documents = attention == "document"
        self._starts = [list(accumulate((s.num_tokens for s in group), initial=0)) for group in shards]

    def batch(self, step: int, rank: int, size: int) -> Batch:
        """Rank `rank` of `size`'s slice of the global batch of `step`: as many rows for all ranks, the last perhaps empty."""
        first, count = self.timeline.samples_before(step), self.timeline.batch_samples(step)
        begin, end = first + count * rank // size, first + count * (rank + 1) // size
        return self.rows(begin, -(-count // size), end)

    def rows(self, first: int, count: int, stop: int | None = None) -> Batch:
        """The samples [first, first + count); those from `stop` on are empty rows."""
        stop, seq_len = min(self.stop, self.stop if stop is None else stop), self.order.seq_len
        rows = np.zeros((count, seq_len + 1), np.int64)
        targets = rows[:, 1:]
        spans = self.order.spans(np.arange(first, max(first, min(first + count, stop))))
        begins: list[int] = []  # where documents begin, in the flattened rows
        ends = [0] * count  # how far each row is filled
        places = zip(spans.rows.tolist(), spans.sources.tolist(), spans.starts.tolist(), spans.counts.tolist(), strict=True)
        for row, source, start, length in places:
            for shard, offset, part in self._parts(source, start, length):
                filled = ends[row]
                rows[row, filled : filled + part] = shard.read(offset, part)
                if self.documents:
                    base = row * (seq_len + 1) + filled
                    begins += [base + place for place in shard.boundaries(offset, part)]
                ends[row] += part
        tokens = rows[:, :seq_len].copy()
        for row, end in enumerate(ends):
            if end <= seq_len:
                targets[row, max(end - 1, 0) :] = IGNORE  # past the end of a source
        if not self.documents:
            return Batch(tokens, targets, None, None)
        starts_BT = np.zeros((count, seq_len + 1), np.bool_)
        starts_BT.reshape(-1)[begins] = True
        targets[starts_BT[:, 1:]] = IGNORE  # what follows a document is not the document's to predict
        begun_BT = starts_BT[:, :seq_len]
        index = np.arange(seq_len)
        last_begin = np.maximum.accumulate(np.where(begun_BT, index, 0), axis=1)
        return Batch(tokens, targets, begun_BT.cumsum(axis=1), index - last_begin)

    def _parts(self, source: int, start: int, length: int) -> Iterator[tuple[Shard, int, int]]:
        """The pieces (shard, first token, tokens) of a stretch of a source."""
        starts = self._starts[source]
        number = bisect.bisect_right(starts, start) - 1
        while length > 0:
            part = min(length, starts[number + 1] - start)
            if part:
                yield self.shards[source][number], start - starts[number], part
            start, length, number = start + part, length - part, number + 1

    def ahead(self, steps: range, rank: int, size: int, depth: int = 2) -> Iterator[Batch]:
        """The batches of `steps`, read up to `depth` steps ahead by a thread."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        pending = deque(pool.submit(self.batch, step, rank, size) for step in steps[:depth])
        try:
            for number in range(len(steps)):
                batch = pending.popleft().result()
                pending.extend(pool.submit(self.batch, step, rank, size) for step in steps[number + depth :][:1])
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Plan:
    """The training data, opened: datasets, the order over them, and the shards behind it."""

    datasets: tuple[Dataset, ...]
    order: Order | MegatronOrder
    shards: tuple[tuple[Shard, ...], ...]

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What the manifests say of the tokenizer: sha256, vocab_size, `bos` and `eos` (ids, or None if the data has none)."""
        return dict(self.datasets[0].manifest["tokenizer"])


def open_plan(data: DataConfig) -> Plan:
    """Open the datasets of a config; reads no tokens. Raises ConfigError when one is not whole, or they do not go together."""
    sources: list[Source] = []
    shards: list[tuple[Shard, ...]] = []
    datasets = tuple(_open(entry) for entry in data.sources)
    hashes: list[str] = []
    for entry, dataset in zip(data.sources, datasets, strict=True):
        if dataset.manifest["tokenizer"] != datasets[0].manifest["tokenizer"]:
            made = "were made with different tokenizers or BOS and EOS; prepare one of them again"
            raise ConfigError(f"data.sources: {dataset.root} and {datasets[0].root} {made}")
        group = [shard for name in dataset.manifest["sources"] for shard in dataset.shards("train", name)]
        identity = f"{dataset.train_hash}#{hashes.count(dataset.train_hash)}"
        hashes.append(dataset.train_hash)
        counts = tuple(shard.num_tokens for shard in group)
        sources.append(Source(identity, counts, entry.weight, entry.max_epochs, entry.at_end, str(dataset.root)))
        shards.append(tuple(group))
    try:
        order = _order(data, sources) if isinstance(data.order, ShuffledConfig) else _megatron_order(data, sources, shards)
    except ValueError as error:
        raise ConfigError(f"data.sources: {error}") from None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every memory map keeps a file open; 1024 is a usual soft limit
    return Plan(datasets, order, tuple(shards))


def _open(entry: SourceConfig) -> Dataset:
    path = Path(entry.path).expanduser()
    if not Path(f"{path}.idx").is_file():
        if entry.tokenizer is not None:
            raise ConfigError(f"data.sources: {path} was given a tokenizer, but there is no {path}.idx to go with it")
        return Dataset(path)
    if entry.tokenizer is None:
        raise ConfigError(f"data.sources: {path}.idx does not say what its tokens mean; give `tokenizer`, a tokenizer.json")
    place = Path(entry.tokenizer).expanduser()
    known = Tokenizer.load(place)
    return BareShard(path, place, known.fingerprint, known.vocab_size, known.eos)


def _order(data: DataConfig, sources: list[Source]) -> Order:
    """The order of a config's sources. Raises ValueError for what does not go together."""
    names = [entry.name or Path(entry.path).name for entry in data.sources]
    if data.temperature is not None:
        if any(source.weight is not None for source in sources):
            raise ValueError("give the sources weights, or give a temperature, not both")
        sources = [replace(source, weight=float(source.num_tokens) ** (1 / data.temperature)) for source in sources]
    if data.phases and len(set(names)) < len(names):
        raise ValueError(f"phases need sources with different names; give them with `name`; they are {', '.join(names)}")
    phases = []
    for number, phase in enumerate(data.phases):
        if unknown := sorted(set(phase.weights) - set(names)):
            raise ValueError(f"phases[{number}].weights: there is no source {', '.join(unknown)}, only {', '.join(names)}")
        if phase.start.unit not in ("samples", "tokens"):
            raise ValueError(f"phases[{number}].start: is '{phase.start}'; give samples or tokens")
        start = int(phase.start.value) // (data.seq_len if phase.start.unit == "tokens" else 1)
        phases.append((start, [phase.weights.get(name, 0.0) for name in names]))
    return Order(sources, data.seq_len, data.seed, phases=phases, skip=data.skip)


def _megatron_order(data: DataConfig, sources: list[Source], shards: list[tuple[Shard, ...]]) -> MegatronOrder:
    """The order of 2021; our own ways to mix have no place in it."""
    ended = any(source.max_epochs != 1.0 or source.at_end != "error" for source in data.sources)
    if data.phases or data.skip or data.temperature is not None or ended:
        raise ValueError("the order megatron-2021 knows weights alone: no phases, skip, temperature, max_epochs or at_end")
    assert isinstance(data.order, Megatron2021Config)
    lengths = [np.concatenate([shard.document_lengths for shard in group]) for group in shards]
    given = [source.weight for source in sources if source.weight is not None]
    names, kind = [source.name for source in sources], data.order
    split = (kind.split, kind.part, kind.last_epoch_threshold, Path(kind.cache).expanduser() if kind.cache else None)
    return MegatronOrder(names, lengths, given or None, data.seq_len, data.seed, kind.samples, *split)


def validation_sets(plan: Plan, data: DataConfig) -> dict[str, tuple[Loader, dict[str, Any]]]:
    """For every held-out source: a loader over its rows as they lie, and its manifest entry (tokens, bytes)."""
    sets: dict[str, tuple[Loader, dict[str, Any]]] = {}
    for dataset in plan.datasets:
        for name, splits in dataset.manifest["sources"].items():
            shards = dataset.shards("validation", name)
            counts = tuple(shard.num_tokens for shard in shards)
            if not sum(counts):
                continue
            order = Order([Source(name, counts)], data.seq_len, shuffle=False)
            timeline = Timeline((), data.seq_len, order.epoch_samples)
            label = name if name not in sets else f"{dataset.root}/{name}"
            sets[label] = Loader(order, [shards], timeline, order.epoch_samples, data.attention), splits["validation"]
    return sets

"""The order of the data: a pure function from (plan, sample index) to the tokens of that sample.

There is no state to save, so a resume on any number of ranks is the same code as a first start. Within a source a keyed
Feistel permutation gives random order in O(1) memory; `mixture` interleaves sources with weights, exactly and for ever; phases
change weights and sources in mid-run. What it refuses to know: files, ranks, batches.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from franca.data.mixture import Mixture

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]
AtEnd = Literal["error", "stop", "renormalise", "repeat"]  # of a source whose max_epochs are over

_MIX1, _MIX2, _GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = [np.uint64(number * 0x9E3779B97F4A7C15 % 2**64) for number in range(6)]


def hash64(values: Words) -> Words:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * _MIX1
    values = (values ^ (values >> np.uint64(27))) * _MIX2
    return values ^ (values >> np.uint64(31))


def _key(*parts: int | str) -> np.uint64:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(indices: Indices, size: int | Indices | Words, key: np.uint64 | Words) -> Indices:
    """A keyed bijection of [0, size), element by element: where each index goes.

    An unbalanced Feistel network over the next power of two with cycle walking (Black and Rogaway 2002): O(1) memory, no
    limit at 2^32. `size` and `key` may differ from element to element.
    """
    sizes: Words = np.broadcast_to(np.asarray(size).astype(np.uint64), indices.shape)
    keys: Words = np.broadcast_to(np.asarray(key, np.uint64), indices.shape)
    bits: Words = np.maximum(2, np.frexp((sizes - np.uint64(1)).astype(np.float64))[1]).astype(np.uint64)
    result = indices.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        result[pending] = _feistel(result[pending], bits[pending], keys[pending])
        pending = pending[result[pending] >= sizes[pending]]
    return result.astype(np.int64)


def _feistel(values: Words, bits: Words, key: Words) -> Words:
    """One pass over [0, 2^bits); an element's result depends on nothing but its own value, width and key."""
    one = np.ones_like(bits)
    low_bits = bits >> one
    high_bits = bits - low_bits
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    for round_key in _ROUND_KEYS:
        low, high = values & low_mask, values >> low_bits
        values = (low << high_bits) | ((high ^ hash64(low + key + round_key)) & high_mask)
        # the halves change places, and so do their widths
        low_bits, high_bits, low_mask, high_mask = high_bits, low_bits, high_mask, low_mask
    return values


@dataclass(frozen=True)
class Source:
    """What the order must know of one corpus: its identity, the token counts of its shards, its share and its limit.

    `name` decides the order with the rest; `label` is what messages call the source, its name if there is none.
    """

    name: str
    shard_tokens: tuple[int, ...]
    weight: float | None = None
    max_epochs: float = 1.0
    at_end: AtEnd = "error"
    label: str = ""

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.shard_tokens)


@dataclass(frozen=True)
class Spans:
    """The tokens of some samples, in pieces: for piece i, `counts[i]` tokens from token `starts[i]` of source `sources[i]`.

    `rows[i]` is the place of the piece's sample among those asked for, ascending. A row has `seq_len + 1` tokens, the last of
    which is only a target (the row after it begins with it); a shorter one is the end of a source. Each field is (pieces,).
    """

    rows: Indices
    sources: Indices
    starts: Indices
    counts: Indices


@dataclass(frozen=True)
class Segment:
    """A stretch of samples with one mixture: from sample `start` on, when `taken` rows of each stream were behind."""

    start: int
    mixture: Mixture
    taken: Indices


class Order:
    """The order of a run's samples.

    Sources without weights are one stream: every row of every source once per epoch. With weights each source is a stream,
    taken in exact proportion. `phases` are (first sample, weights of all sources) that follow the sources' own weights.
    `skip` are ranges of samples that are left out. `shuffle=False` (validation) takes the rows of a stream as they lie.

    `end` is the number of samples after which there is nothing left to take; None when that never happens.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        phases: Sequence[tuple[int, Sequence[float]]] = (),
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.sources, self.seq_len, self.seed, self.shuffle = tuple(sources), seq_len, seed, shuffle
        self.skip = sorted(skip)
        edges = [edge for span in self.skip for edge in span]
        if edges != sorted(edges) or any(edge < 0 for edge in edges):
            raise ValueError(f"skip: the ranges {self.skip} overlap or are not [first, last)")
        self._tokens = np.array([source.num_tokens for source in sources], np.int64)
        rows = -(-self._tokens // seq_len)  # of one epoch; the last one may be short
        labels = [source.label or source.name for source in sources]
        weights = [source.weight for source in sources]
        if not rows.sum():
            raise ValueError(f"the sources {labels} hold no tokens")
        self.epoch_samples = int(rows.sum())
        self._row_offsets = np.concatenate([[0], np.cumsum(rows)])
        given = [weight for weight in weights if weight is not None]
        if (given and len(given) < len(weights)) or (phases and not given):
            raise ValueError("either every source has a weight or none has; phases need weights")
        self._one_stream = not given
        if self._one_stream:  # the sources lie one behind the other
            least = min(sources, key=lambda source: source.max_epochs)
            stream = Source("all", (int(rows.sum()),), 1.0, least.max_epochs, least.at_end, " + ".join(labels))
            self._streams, self._rows, given = [stream], np.array([self.epoch_samples], np.int64), [1.0]
        else:
            self._streams, self._rows = list(sources), rows
        self._keys = np.array([_key(seed, "rows", stream.name) for stream in self._streams], np.uint64)
        # Rows that may be taken. As the user wrote it: 0.29 of 100 rows are 29, not 28.
        limits = zip(self._rows.tolist(), self._streams, strict=True)
        self._limits = [int(count * Fraction(str(stream.max_epochs))) for count, stream in limits]
        self.segments, end = self._plan([(0, given), *phases])
        self.end = end if end is None else end - sum(max(0, min(last, end) - first) for first, last in self.skip)
        self._starts = np.array([segment.start for segment in self.segments], np.int64)

    def _plan(self, phases: Sequence[tuple[int, Sequence[float]]]) -> tuple[list[Segment], int | None]:
        """Phase after phase, cut where a source ends that then leaves the mixture or ends the run."""
        segments: list[Segment] = []
        taken = np.zeros(len(self._streams), np.int64)
        for number, (start, given) in enumerate(phases):
            stop = phases[number + 1][0] if number + 1 < len(phases) else None
            if len(given) != len(self._streams) or (stop is not None and stop <= start):
                raise ValueError(f"phase {number}: needs {len(self._streams)} weights and a start after the phase before it")
            if not any(given):
                raise ValueError(f"phase {number}: of the weights {list(given)}, one must be above zero")
            weights = list(given)
            for index, stream in enumerate(self._streams):
                if weights[index] and not self._rows[index]:
                    raise ValueError(f"source {stream.label or stream.name!r} holds no tokens")
                if stream.at_end == "renormalise" and taken[index] >= self._limits[index]:
                    weights[index] = 0.0
            while True:
                if not any(weights):
                    return segments, start
                segment = Segment(start, Mixture(weights), taken)
                segments.append(segment)
                ends = [
                    (start + segment.mixture.reach(index, self._limits[index] - int(taken[index])), index)
                    for index, stream in enumerate(self._streams)
                    if weights[index] and stream.at_end in ("stop", "renormalise")
                ]
                end, index = min(ends, default=(None, -1))
                if end is None or (stop is not None and end >= stop):
                    break
                taken = taken + segment.mixture.counts(end - start)
                start = end
                if self._streams[index].at_end == "stop":
                    return segments, end
                weights[index] = 0.0
            if stop is not None:
                taken = taken + segment.mixture.counts(stop - start)
        return segments, None

    def _draw(self, samples: Indices) -> tuple[Indices, Indices]:
        """For each sample, its stream and its number within that stream."""
        for first, last in self.skip:
            samples = np.where(samples >= first, samples + (last - first), samples)
        segment_of = np.searchsorted(self._starts, samples, side="right") - 1
        streams, numbers = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(segment_of).tolist():
            here, segment = segment_of == number, self.segments[number]
            streams[here], drawn = segment.mixture.draw(samples[here] - segment.start)
            numbers[here] = segment.taken[streams[here]] + drawn
        return streams, numbers

    def spans(self, samples: Indices) -> Spans:
        """The tokens of samples, in any order and as often as asked: (n,) -> Spans of (n,)."""
        samples = np.asarray(samples, np.int64)
        stream, number = self._draw(samples)
        rows = self._rows[stream]
        epochs, row = number // rows, number % rows
        if self.shuffle:
            row = permute(row, rows, hash64(epochs.astype(np.uint64) * _GOLDEN ^ self._keys[stream]))
        if self._one_stream:
            stream = np.searchsorted(self._row_offsets, row, side="right") - 1
            row = row - self._row_offsets[stream]
        starts = row * self.seq_len
        return Spans(np.arange(len(row)), stream, starts, np.minimum(self.seq_len + 1, self._tokens[stream] - starts))

    def rows_needed(self, samples: int) -> Indices:
        """How many rows of each stream the first `samples` samples use up, skipped ones counted: (streams,)."""
        place = self._place(samples)
        segment = self.segments[int(np.searchsorted(self._starts, place, side="right")) - 1]
        return segment.taken + segment.mixture.counts(place - segment.start)

    def _place(self, samples: int) -> int:
        """Where `samples` samples end in the whole sequence, skipped ones counted."""
        for first, last in self.skip:
            samples += last - first if samples > first else 0
        return samples

    def shortages(self, samples: int) -> list[str]:
        """One line for every stream that a run of `samples` samples would take more often than its max_epochs."""
        lines = []
        needs = zip(self._streams, self.rows_needed(samples).tolist(), self._rows.tolist(), self._limits, strict=True)
        for stream, needed, rows, limit in needs:
            if stream.at_end == "error" and needed > limit:
                given = f"{stream.label or stream.name} has {rows:,} rows of {self.seq_len} tokens"
                lack = f"the run takes {needed:,} rows: {(needed - limit) * self.seq_len:,} tokens are missing"
                enough = f"raise max_epochs (to {-(-1000 * needed // rows) / 1000:.12g})"
                start = f"data.sources: {given} and max_epochs {stream.max_epochs:g}, but {lack}"
                lines.append(f"{start}. Add data, {enough}, set at_end, or shorten the run.")
        return lines

    def fingerprint(self, samples: int | None = None) -> str:
        """A hash of everything that decides the tokens of the first `samples` samples (None: of all).

        What comes after them may change in a run: later phases, limits, sources that only later phases use.
        """
        version = 2  # raised whenever the order of the same plan changes
        place = self._place(samples) if samples is not None else None
        segments = [segment for segment in self.segments if place is None or segment.start < max(1, place)]
        mixed = [{self._streams[i].name: str(n) for i, n in enumerate(s.mixture.parts) if n} for s in segments]
        used = [[s.name, s.shard_tokens] for s in self.sources if self._one_stream or any(s.name in names for names in mixed)]
        skip = [span for span in self.skip if place is None or span[0] < place]
        plan = [version, self.seed, self.seq_len, self.shuffle, used, [s.start for s in segments], mixed, skip]
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

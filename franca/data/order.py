"""The order of the data: a pure function from (plan, sample index) to the tokens of that sample.

There is no state to save, so a resume on any number of ranks is the same code as a first start. Within a source a keyed
Feistel permutation gives random order in O(1) memory; sources are mixed by cumulative rounding, so that at the end of every
block of samples each has had its share to within one sample, for ever. What it refuses to know: files, ranks, batches.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

SMALLEST_SHARE = 1e-6  # of a mixture: the samples of a block are counted one by one, so a block must fit into memory

_MIX1, _MIX2, _GOLDEN = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
_ROUND_KEYS = [np.uint64(number * 0x9E3779B97F4A7C15 % 2**64) for number in range(6)]


def _hash64(values: Words) -> Words:
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
        values = (low << high_bits) | ((high ^ _hash64(low + key + round_key)) & high_mask)
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
    label: str = ""

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.shard_tokens)


@dataclass(frozen=True)
class Spans:
    """The tokens of some samples: for sample i, `counts[i]` tokens from token `starts[i]` of source `sources[i]`.

    A row has `seq_len + 1` tokens, the last of which is only a target (the row after it begins with it); a shorter count
    is the end of a source. Each field is (samples,).
    """

    sources: Indices
    starts: Indices
    counts: Indices
    epochs: Indices


class Order:
    """The order of a run's samples.

    Sources without weights are one stream: every row of every source once per epoch. With weights, sample by sample in
    exact proportion. `shuffle=False` (validation) takes the rows of a stream as they lie.
    """

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int = 0, shuffle: bool = True) -> None:
        self.sources, self.seq_len, self.seed, self.shuffle = tuple(sources), seq_len, seed, shuffle
        self._tokens = np.array([source.num_tokens for source in sources], np.int64)
        rows = -(-self._tokens // seq_len)  # of one epoch; the last one may be short
        labels = [source.label or source.name for source in sources]
        weights = [source.weight for source in sources]
        if not rows.sum():
            raise ValueError(f"the sources {labels} hold no tokens")
        if any(weight is not None for weight in weights) and None in weights:
            raise ValueError("either every source has a weight or none has")
        self.epoch_samples = int(rows.sum())
        if weights[0] is None:  # one stream: the sources lie one behind the other
            self._stream_rows = np.array([self.epoch_samples], np.int64)
            self._cumulative = np.array([0.0, 1.0])
            self._limits = [(" + ".join(labels), min(source.max_epochs for source in sources))]
        else:
            shares = np.array(weights, np.float64)
            if not rows.all():
                raise ValueError(f"source {labels[int(np.argmin(rows))]!r} holds no tokens")
            shares /= shares.sum()
            if shares.min() < SMALLEST_SHARE:
                rare = f"the weight of {labels[int(np.argmin(shares))]} is {shares.min():.1g} of the sum"
                raise ValueError(f"{rare}; at least {SMALLEST_SHARE:g} is needed. Raise it, or leave the source out.")
            self._stream_rows = rows
            self._limits = [(label, source.max_epochs) for label, source in zip(labels, sources, strict=True)]
            self._cumulative = np.concatenate([[0.0], np.cumsum(shares)])
            self._cumulative[-1] = 1.0
        self._row_offsets = np.concatenate([[0], np.cumsum(rows)])
        names = [source.name for source in sources] if len(self._stream_rows) > 1 else ["all"]
        self._stream_keys = np.array([_key(seed, "rows", name) for name in names], np.uint64)
        # A block in which every stream has at least two places never rounds to a negative count.
        self._block = max(1024, int(np.ceil(2 / np.diff(self._cumulative).min())))

    def _taken(self, samples: Indices) -> NDArray[np.int64]:
        """Samples of each stream (and, before it, of all streams to its left) among the first `samples`: (n, streams + 1)."""
        return np.floor(samples[:, None] * self._cumulative[None, :] + 0.5).astype(np.int64)

    def _streams(self, samples: Indices) -> tuple[Indices, Indices]:
        """For each sample, its stream and its number within that stream."""
        if len(self._stream_rows) == 1:
            return np.zeros_like(samples), samples
        block = samples // self._block
        keys = _hash64(block.astype(np.uint64) * _GOLDEN ^ _key(self.seed, "block"))
        place = permute(samples - block * self._block, self._block, keys)
        before, after = self._taken(block * self._block), self._taken((block + 1) * self._block)
        ends = np.diff(after - before, axis=1).cumsum(axis=1)
        stream = (place[:, None] >= ends).sum(axis=1)
        pick = np.arange(len(samples))
        first = np.concatenate([np.zeros((len(samples), 1), np.int64), ends], axis=1)[pick, stream]
        return stream, np.diff(before, axis=1)[pick, stream] + place - first

    def spans(self, samples: Indices) -> Spans:
        """The tokens of samples, in any order and as often as asked: (n,) -> Spans of (n,)."""
        samples = np.asarray(samples, np.int64)
        stream, number = self._streams(samples)
        rows = self._stream_rows[stream]
        epochs, row = number // rows, number % rows
        if self.shuffle:
            keys = _hash64(epochs.astype(np.uint64) * _GOLDEN ^ self._stream_keys[stream])
            row = permute(row, rows, keys)
        if len(self._stream_rows) == 1:
            stream = np.searchsorted(self._row_offsets, row, side="right") - 1
            row = row - self._row_offsets[stream]
        starts = row * self.seq_len
        return Spans(stream, starts, np.minimum(self.seq_len + 1, self._tokens[stream] - starts), epochs)

    def rows_needed(self, samples: int) -> list[tuple[str, int, int, float]]:
        """For the first `samples` samples: (label, rows needed, rows per epoch, max_epochs) of every stream."""
        begun = samples // self._block * self._block
        needed = np.diff(self._taken(np.array([begun])), axis=1)[0]
        stream, number = self._streams(np.arange(begun, samples))
        np.maximum.at(needed, stream, number + 1)
        facts = zip(self._limits, needed.tolist(), self._stream_rows.tolist(), strict=True)
        return [(label, count, rows, limit) for (label, limit), count, rows in facts]

    def shortages(self, samples: int) -> list[str]:
        """One line for every stream that a run of `samples` samples would take more often than its max_epochs."""
        lines = []
        for label, needed, rows, limit in self.rows_needed(samples):
            missing = needed - int(rows * Fraction(str(limit)))  # as the user wrote it: 0.29 of 100 rows are 29, not 28
            if missing > 0:
                given = f"{label} has {rows:,} rows of {self.seq_len} tokens and max_epochs {limit:g}"
                lack = f"the run takes {needed:,} rows: {missing * self.seq_len:,} tokens are missing"
                advice = f"Add data, raise max_epochs (to {-(-1000 * needed // rows) / 1000:.12g}) or shorten the run."
                lines.append(f"data.sources: {given}, but {lack}. {advice}")
        return lines

    @cached_property
    def fingerprint(self) -> str:
        """The plan's hash: everything that decides which tokens a sample holds. Limits do not: they may be raised."""
        version = 1  # raised whenever the order of the same plan changes
        sources = [[source.name, list(source.shard_tokens), source.weight] for source in self.sources]
        plan = {"version": version, "seed": self.seed, "seq_len": self.seq_len, "shuffle": self.shuffle, "sources": sources}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

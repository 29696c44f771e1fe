"""Exact interleaving of weighted streams: a pure function from a sample's index to its stream and its number within it.

At every prefix, however long, each stream has had its share to within one sample. It needs no state and O(block) memory.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

SMALLEST_SHARE = 1e-6  # a block has at least one sample of every stream, and must fit into memory
BLOCK = 1024
_KEPT = 4  # blocks


class Mixture:
    """An endless sequence of streams in proportion to `weights` (not negative; 0: the stream does not take part).

    Cut into blocks. The counts at the end of a block are the ideal ones, rounded by largest remainder. Within a block, the
    j-th sample of a stream may come when the stream's share has passed j - 1, and must have come when it has passed j;
    earliest deadline first keeps to that (Baruah et al. 1996, "Proportionate progress", on one processor).

    Raises ValueError when no weight is above zero, or one is too small a part of the sum.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        total = sum(exact)
        if min(exact) < 0 or total <= 0:
            raise ValueError(f"weights must not be negative, and one must be above zero; got {list(weights)}")
        shares = [weight / total for weight in exact]
        self.num_streams = len(shares)
        self.unit = math.lcm(*(share.denominator for share in shares))
        self.parts = [int(share * self.unit) for share in shares]  # of `unit` samples
        smallest = min(share for share in shares if share)
        if smallest < SMALLEST_SHARE:
            raise ValueError(f"a weight is {float(smallest):.1g} of the sum; at least {SMALLEST_SHARE:g} is needed")
        self.block = max(BLOCK, math.ceil(1 / smallest))
        self._blocks: dict[int, tuple[Indices, Indices]] = {}

    def _border(self, samples: int) -> list[int]:
        """The samples of each stream among the first `samples`, at the end of a block."""
        counts = [part * samples // self.unit for part in self.parts]
        by_remainder = sorted(range(self.num_streams), key=lambda i: (-(self.parts[i] * samples % self.unit), i))
        for i in by_remainder[: samples - sum(counts)]:
            counts[i] += 1
        return counts

    def _interleaved(self, number: int) -> tuple[Indices, Indices]:
        """Block `number`: for each of its samples the stream, and the number within the stream."""
        if number not in self._blocks:
            begin, end = number * self.block, (number + 1) * self.block
            counts, coming = self._border(begin), list[tuple[int, int, int]]()
            for i, (first, last, part) in enumerate(zip(counts, self._border(end), self.parts, strict=True)):
                # The j-th sample (from 1) of stream i belongs to [ceil((j - 1) / share), floor(j / share) + 1], counted from 1.
                coming += [(-(-(j - 1) * self.unit // part), j * self.unit // part + 1, i) for j in range(first + 1, last + 1)]
            coming.sort()
            streams, ready, at = list[int](), list[tuple[int, int]](), 0
            for sample in range(begin + 1, end + 1):
                while at < len(coming) and coming[at][0] <= sample:
                    heapq.heappush(ready, coming[at][1:])
                    at += 1
                streams.append(heapq.heappop(ready)[1])
            stream = np.array(streams, np.int64)
            within = np.empty_like(stream)
            for i, count in enumerate(counts):
                places = np.flatnonzero(stream == i)
                within[places] = count + np.arange(len(places))
            self._blocks = {kept: self._blocks[kept] for kept in list(self._blocks)[1 - _KEPT :]} | {number: (stream, within)}
        return self._blocks[number]

    def draw(self, samples: Indices) -> tuple[Indices, Indices]:
        """For each sample, its stream and its number within that stream: two arrays (n,)."""
        if self.num_streams == 1:
            return np.zeros_like(samples), samples
        streams, numbers = np.empty_like(samples), np.empty_like(samples)
        blocks = samples // self.block
        for block in np.unique(blocks).tolist():
            here = blocks == block
            stream, within = self._interleaved(block)
            places = samples[here] - block * self.block
            streams[here], numbers[here] = stream[places], within[places]
        return streams, numbers

    def counts(self, samples: int) -> Indices:
        """How many of the first `samples` samples are of each stream: (streams,)."""
        block, rest = divmod(samples, self.block)
        counts = np.array(self._border(block * self.block), np.int64)
        if rest:
            counts += np.bincount(self._interleaved(block)[0][:rest], minlength=self.num_streams)
        return counts

    def reach(self, stream: int, count: int) -> int:
        """The smallest number of samples among which `count` are of `stream`."""
        if count <= 0:
            return 0
        block = max(0, (count - 1) * self.unit // self.parts[stream] // self.block - 1)
        while self._border((block + 1) * self.block)[stream] < count:
            block += 1
        missing = count - self._border(block * self.block)[stream]
        return block * self.block + int(np.flatnonzero(self._interleaved(block)[0] == stream)[missing - 1]) + 1

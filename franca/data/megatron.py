"""The order of Megatron-LM of 2021 (BigScience's tr1-13B), sample for sample, so that published runs can be run again.

The documents of a source are cut out by a split, repeated for as many epochs as the run needs, shuffled, laid one behind the
other and cut into rows of `seq_len + 1` tokens, each of which begins with the last token of the row before it; the rows are
shuffled again. Several sources are blended by a greedy rule. The number of samples that the run is to take decides the number
of epochs, and with it the order from the first sample on. What it refuses to know: files, ranks, batches.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from franca.core.run import write_atomically
from franca.data.mixture import Indices
from franca.data.order import Spans

PARTS = ("train", "validation", "test")

Lengths = NDArray[np.int32] | NDArray[np.int64]


def _shares(values: Sequence[float]) -> list[float]:
    """Divided by their sum, which is added up from left to right: `sum` compensates for rounding since Python 3.12."""
    total = reduce(add, values)
    return [value / total for value in values]


def split_boundaries(split: str, num_documents: int) -> list[int]:
    """Where the parts of a split like `949,50,1` begin and end: part i is documents [result[i], result[i + 1]).

    Each share is rounded by itself; what this makes too many or too few in all is then taken from every boundary but the
    first. In a handful of documents the second boundary can so become -1. Raises ValueError for what is no split.
    """
    try:
        values = [float(value) for value in split.split("," if "," in split else "/")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or not all(0 <= value < math.inf for value in values) or not any(values):
        advice = "Give up to three numbers of at least 0 for train, validation and test, such as 949,50,1."
        raise ValueError(f"the split {split!r} cannot be read. {advice}")
    boundaries = [0]
    for share in _shares([*values, 0.0, 0.0][:3]):
        boundaries.append(boundaries[-1] + round(share * float(num_documents)))
    excess = boundaries[-1] - num_documents
    return [0, *(boundary - excess for boundary in boundaries[1:])]


def epochs_needed(tokens: int, num_samples: int, seq_len: int, threshold: float) -> tuple[int, int]:
    """Epochs that hold `num_samples` rows, and how many of them are shuffled together: all, or all but the last.

    The last one stands apart when the run takes less than `threshold` of it.
    """
    epochs = -(-(num_samples * seq_len + 1) // tokens)
    taken_of_last = num_samples - ((epochs - 1) * tokens - 1) // seq_len
    apart = epochs > 1 and taken_of_last < int(threshold * ((tokens - 1) // seq_len))
    return epochs, epochs - apart


class Stream:
    """The rows of one source: its documents [begin, end) for some epochs, of which the first `together` are shuffled together.

    `documents` is the order of the documents, `ends` the token after each of them in that order, and `shuffle[i]` the number
    of the row that comes at place i. Row k begins with token k * seq_len of that order: an index of the rows is not kept.
    `starts` is the first token of each document in the source.
    """

    def __init__(self, lengths: Lengths, seq_len: int, columns: Sequence[NDArray[Any]]) -> None:
        self.lengths, self.seq_len = lengths, seq_len
        self.documents, self.shuffle, self.ends, self.starts = columns

    @staticmethod
    def columns(
        lengths: Lengths, begin: int, end: int, epochs: int, together: int, seq_len: int, seed: int
    ) -> list[NDArray[Any]]:
        """Draw them: `documents`, `shuffle`, `ends`, `starts`."""
        tokens = int(lengths[begin:end].sum(dtype=np.int64))
        rows, first_rows = (epochs * tokens - 1) // seq_len, (together * tokens - 1) // seq_len
        documents = np.tile(np.arange(begin, end, dtype=np.int32), epochs)
        shuffle = np.arange(rows, dtype=np.uint32 if rows < 2**32 else np.int64)
        rng = np.random.RandomState(seed)
        for column, cut in (documents, (end - begin) * together), (shuffle, first_rows):
            rng.shuffle(column[:cut])
            rng.shuffle(column[cut:])
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return [documents, shuffle, np.cumsum(lengths[documents], dtype=np.int64), starts]

    def pieces(self, places: Indices) -> tuple[Indices, Indices, Indices]:
        """The pieces of documents that make up the rows at some places: which place, first token in the source, tokens."""
        begins = self.shuffle[places].astype(np.int64) * self.seq_len
        first = np.searchsorted(self.ends, begins, side="right")
        counts = np.searchsorted(self.ends, begins + self.seq_len, side="right") + 1 - first
        rows = np.repeat(np.arange(len(places)), counts)
        nth = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts) + first[rows]
        document, end = self.documents[nth], self.ends[nth]
        begin = end - self.lengths[document]
        lower = np.maximum(begin, begins[rows])
        size = np.minimum(end, begins[rows] + self.seq_len + 1) - lower
        some = size > 0  # empty documents give no piece
        return rows[some], (self.starts[document] + lower - begin)[some], size[some]


def _shared(folder: Path | None, name: str, make: Callable[[], list[NDArray[Any]]]) -> list[NDArray[Any]]:
    """What `make` gives; with a folder, made once, kept there, and mapped: the processes of a machine share the memory."""
    if folder is None:
        return make()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        count = folder / f"{name}.count"  # written last
        if not count.exists():
            arrays = make()
            for number, array in enumerate(arrays):
                np.save(folder / f"{name}.{number}.npy", array, allow_pickle=False)
            write_atomically(count, str(len(arrays)))
        paths = [folder / f"{name}.{number}.npy" for number in range(int(count.read_text()))]
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]


def _greedy(weights: NDArray[np.float64], begins: Indices, taken: NDArray[np.float64], steps: int) -> NDArray[np.int16]:
    """The greedy rule in lanes side by side: sources of steps [begins, begins + steps), (steps, lanes); moves `taken` on."""
    picks, lanes = np.empty((steps, len(begins)), np.int16), np.arange(len(begins))
    for step in range(steps):
        picks[step] = pick = (weights[:, None] * np.maximum(begins + step, 1) - taken).argmax(axis=0)
        taken[pick, lanes] += 1
    return picks


def blend(weights: NDArray[np.float64], num_samples: int) -> NDArray[np.int16]:
    """The source of every sample: at step i the one with the largest weight * max(i, 1) - taken, ties to the lowest number.

    The rule is sequential, but soon forgets where it began. So the steps are cut into lanes, every lane but the first begins
    with a guess of what was taken, and all are run at once; then each lane that did not begin where the one before it ended
    is run again from there. When there is none left the result is the sequential one, bit for bit, whatever the guesses.
    """
    steps = max(64, math.isqrt(num_samples))
    begins = np.arange(0, num_samples, steps)
    ideal = weights[:, None] * begins
    starts = np.floor(ideal)
    rank = (starts - ideal).argsort(axis=0, kind="stable").argsort(axis=0)
    starts += rank < begins - starts.sum(axis=0)  # the largest remainders are rounded up
    starts[weights.argmax()] += begins - starts.sum(axis=0)
    ends, picks = np.empty_like(starts), np.empty((steps, len(begins)), np.int16)
    stale = np.arange(len(begins))
    while len(stale):
        taken = starts[:, stale]
        picks[:, stale] = _greedy(weights, begins[stale], taken, steps)
        ends[:, stale] = taken
        stale = 1 + np.flatnonzero((starts[:, 1:] != ends[:, :-1]).any(axis=0))
        starts[:, 1:] = ends[:, :-1]
    return picks.T.reshape(-1)[:num_samples]


class MegatronOrder:
    """The order of a run of `num_samples` samples over sources, given by the lengths of their documents in tokens.

    Without weights there is one source and no blending; with weights each source is made 0.5 % longer than its share, and
    one source with a weight has therefore another order than without. `last_epoch_threshold` is 0.80 in Megatron-LM and
    0.95 in later versions of Megatron-DeepSpeed. The indices are built on first use, and kept in the folder `cache` if there is
    one. Raises ValueError for what gives no order.
    """

    def __init__(
        self,
        names: Sequence[str],
        document_lengths: Sequence[Lengths],
        weights: Sequence[float] | None,
        seq_len: int,
        seed: int,
        num_samples: int,
        split: str = "949,50,1",
        part: str = "train",
        last_epoch_threshold: float = 0.80,
        cache: Path | None = None,
    ) -> None:
        self.names, self.seq_len, self.seed, self.num_samples, self.cache = tuple(names), seq_len, seed, num_samples, cache
        self._lengths = tuple(document_lengths)
        if part not in PARTS:
            raise ValueError(f"the split has no part {part!r}; its parts are {', '.join(PARTS)}")
        if len(names) != (1 if weights is None else len(weights)):
            given = "no weights" if weights is None else f"{len(weights)} weights"
            raise ValueError(f"{given} for {len(names)} sources: give each a weight (a single source can be without)")
        if weights is not None and not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"the weights are {list(weights)}; each must be above 0. Leave out a source that is not wanted.")
        self._weights = None if weights is None else _shares(weights)
        wanted = [num_samples] if self._weights is None else [math.ceil(num_samples * w * 1.005) for w in self._weights]
        self.epoch_samples, self.end = 0, None
        self._plan: list[tuple[int, int, int, int]] = []  # of each source: begin, end, epochs, together
        for name, lengths, count in zip(names, document_lengths, wanted, strict=True):
            begin, end = split_boundaries(split, len(lengths))[PARTS.index(part) :][:2]
            if not 0 <= begin < end:
                problem = f"the split {split} leaves no documents of {name} (which has {len(lengths):,}) for {part}"
                raise ValueError(f"{problem}. Give this part a larger share, or take more documents.")
            tokens = int(lengths[begin:end].sum(dtype=np.int64))
            if tokens <= seq_len:
                problem = f"the {part} part of {name} has {tokens:,} tokens; one sample needs {seq_len + 1:,}"
                raise ValueError(f"{problem}. Lower seq_len, or take more documents.")
            self._plan.append((begin, end, *epochs_needed(tokens, count, seq_len, last_epoch_threshold)))
            self.epoch_samples += (tokens - 1) // seq_len

    @cached_property
    def streams(self) -> list[Stream]:
        """The rows of each source."""

        def stream(number: int, lengths: Lengths, plan: tuple[int, int, int, int]) -> Stream:
            make = partial(Stream.columns, lengths, *plan, self.seq_len, self.seed)
            return Stream(lengths, self.seq_len, _shared(self.cache, f"{self._hash[:16]}-{number}", make))

        return [stream(number, *each) for number, each in enumerate(zip(self._lengths, self._plan, strict=True))]

    @cached_property
    def blended(self) -> list[NDArray[Any]]:
        """For every sample of a blend its source and its place in that source's stream, each (num_samples,)."""
        return _shared(self.cache, f"{self._hash[:16]}-{self.num_samples}-blend", self._blend)

    def _blend(self) -> list[NDArray[Any]]:
        weights = np.array(self._weights)
        sources = blend(weights / weights.sum(), self.num_samples)  # divided once more, as there: it decides ties
        places = np.empty(self.num_samples, np.int64)
        for number in range(len(weights)):
            mine = sources == number
            places[mine] = np.arange(np.count_nonzero(mine))
        return [sources, places]

    def spans(self, samples: Indices) -> Spans:
        """The tokens of samples below `num_samples`, in any order and as often as asked: (n,) -> Spans of their pieces."""
        sources, places = np.zeros(len(samples), np.int16), np.asarray(samples, np.int64)
        if self._weights is not None:
            sources, places = self.blended[0][places], self.blended[1][places]
        pieces = []
        for number, stream in enumerate(self.streams):
            asked = np.flatnonzero(sources == number)
            rows, starts, counts = stream.pieces(places[asked])
            pieces.append((asked[rows], np.full_like(rows, number), starts, counts))
        columns = [np.concatenate(column) for column in zip(*pieces, strict=True)]
        ascending = columns[0].argsort(kind="stable")
        return Spans(*(column[ascending] for column in columns))

    def shortages(self, samples: int) -> list[str]:
        """One line if a run of `samples` samples takes more than the order was made for."""
        if samples <= self.num_samples:
            return []
        problem = f"the run takes {samples:,} samples, but this order was made for {self.num_samples:,}"
        return [
            f"{problem}. Make it for as many (more epochs give another order from the first sample on), or train for fewer."
        ]

    def fingerprint(self, samples: int | None = None) -> str:
        """A hash of all that decides the order. It is one for any number of samples: the epochs decide all of them."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        version = 1  # raised whenever the order changes
        sources = [[name, len(lengths)] for name, lengths in zip(self.names, self._lengths, strict=True)]
        facts = ["megatron", version, self.seed, self.seq_len, self._weights, sources, self._plan]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for lengths in self._lengths:
            digest.update(lengths.astype("<i8").data)
        return digest.hexdigest()

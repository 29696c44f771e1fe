"""Which documents are copies of others: equal ones, or nearly equal ones (MinHash, by datatrove's blocks).

Stage after stage runs in `folder`, each a list of tasks. A task writes into a folder of its own and moves the files into place;
its mark comes last. So a search that was killed anywhere goes on where it was, with the same result. What it refuses to know:
files, tokens, what is done with the answer.

Numbers: minhash takes 952 bytes of disk for each document until the search ends; exact 8, and 3 of memory in each worker. Two
different texts have the same 64-bit hash with odds of 1 in 1.8e19: exact drops one document too many of 1e9 with a probability
of 3 %, about three of 1e10.
"""

import hashlib
import io
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from franca.core.errors import ConfigError
from franca.core.run import write_atomically
from franca.core.workers import pool

Kind = Literal["exact", "minhash"]
Unit = Callable[[], Iterator[str]]

NGRAM, BUCKETS, HASHES = 5, 14, 8  # FineWeb's (arXiv 2406.17557): pairs of Jaccard similarity 0.8 are found with p = 0.92
RANGES = 16  # of hashes, searched by themselves for equal ones
WINDOW = 1_000_000  # characters of a long document that are cut into words at a time
SHINGLES = 4096  # of a document that are hashed at a time
# The stages of a search with their numbers of tasks; the first has one for each unit.
STAGES = {"exact": {"hashes": 0, "pairs": RANGES}, "minhash": {"signatures": 0, "pairs": BUCKETS, "clusters": 1}}


@dataclass(frozen=True)
class Task:
    """One rank of a stage, as datatrove counts: `step.run(documents, rank, world_size)`."""

    kind: Kind
    folder: Path
    stage: str
    rank: int
    world_size: int
    unit: Unit | None

    @property
    def mark(self) -> Path:
        return self.folder / f"{self.stage}-{self.rank}.done"


def duplicates(kind: Kind, units: Sequence[Unit], folder: Path, workers: int) -> list[NDArray[np.int64]]:
    """For every unit the sorted positions of the documents to drop: of equals all but the first in the order of the units.

    A unit yields the same documents whenever it is called, and can be pickled. `folder` is for these units alone; where it
    holds their answer nothing is read. Raises ConfigError when a package is missing or too many files would be open.
    """
    if not units:
        return []
    answer, work = folder / f"{kind}.npz", folder / kind
    if not answer.exists():
        _require(kind, len(units))
        work.mkdir(parents=True, exist_ok=True)
        with pool(workers, work, folder) as processes:
            each = processes.map if workers > 1 else map
            for stage, count in STAGES[kind].items():
                inputs = [None] * count if count else list(units)
                tasks = [Task(kind, work, stage, rank, len(inputs), unit) for rank, unit in enumerate(inputs)]
                list(each(_do, [task for task in tasks if not task.mark.exists()]))
        found = (_exact_found if kind == "exact" else _minhash_found)(work, len(units))
        file = io.BytesIO()
        np.savez(file, positions=np.concatenate(found), counts=[len(part) for part in found])
        write_atomically(answer, file.getvalue())
    shutil.rmtree(work, ignore_errors=True)
    with np.load(answer) as arrays:
        assert len(arrays["counts"]) == len(units), f"{folder} belongs to other units"
        return np.split(arrays["positions"], np.cumsum(arrays["counts"])[:-1])


def _require(kind: Kind, num_units: int) -> None:
    """datatrove, and the right to have a stage's files of all units open at once."""
    try:
        if kind == "minhash":
            import datatrove.pipeline.dedup  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"deduplication: {error}. It needs datatrove; run: pip install 'franca[data]'") from None
    needed = 2 * num_units + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > (hard if hard != resource.RLIM_INFINITY else needed):
        given = f"{num_units:,} groups of files need {needed:,} open files, {hard:,} are allowed"
        raise ConfigError(f"deduplication: {given}. Raise the limit (ulimit -Hn), or put the documents into fewer files.")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))  # workers inherit it


def _do(task: Task) -> None:
    output = task.folder / f"{task.stage}-{task.rank}.{os.getpid()}.partial"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    (_exact if task.kind == "exact" else _minhash)(task, output)
    for path in filter(Path.is_file, output.rglob("*")):
        place = task.folder / task.stage / path.relative_to(output)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(output, ignore_errors=True)
    write_atomically(task.mark, b"")


def _exact(task: Task, output: Path) -> None:
    """The hashes of a unit's documents; or, of one range of hashes, the places of all but the first with the same."""
    if task.unit is not None:
        digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in task.unit())
        np.save(output / f"{task.rank:08d}.npy", np.fromiter((int.from_bytes(d, "little") for d in digests), np.uint64))
        return
    units = [np.load(path, mmap_mode="r") for path in sorted((task.folder / "hashes").glob("*.npy"))]
    places = [np.flatnonzero(hashes % np.uint64(RANGES) == task.rank) for hashes in units]
    mine = np.concatenate([hashes[where] for hashes, where in zip(units, places, strict=True)])
    is_copy = np.ones(len(mine), np.bool_)
    is_copy[np.unique(mine, return_index=True)[1]] = False
    of_units = np.split(is_copy, np.cumsum([len(where) for where in places])[:-1])
    np.savez(output / f"{task.rank}.npz", *(where[copies] for where, copies in zip(places, of_units, strict=True)))


def _exact_found(work: Path, num_units: int) -> list[NDArray[np.int64]]:
    with ExitStack() as opened:
        ranges = [opened.enter_context(np.load(work / "pairs" / f"{part}.npz")) for part in range(RANGES)]
        return [np.sort(np.concatenate([part[f"arr_{unit}"] for part in ranges])) for unit in range(num_units)]


def _minhash(task: Task, output: Path) -> None:
    """A step of datatrove's."""
    from datatrove.data import Document  # type: ignore[import-untyped]
    from loguru import logger

    logger.disable("datatrove")
    step = _minhash_step(task, str(output))
    if task.unit is not None:
        step.run((Document(text=text, id="") for text in task.unit()), task.rank, task.world_size)
    else:
        with redirect_stderr(io.StringIO()):  # bars of tqdm
            step.run(None, task.rank, task.world_size)


def _minhash_step(task: Task, output: str) -> Any:
    from datatrove.pipeline.dedup import minhash as blocks  # type: ignore[import-untyped]
    from datatrove.utils.hashing import HashConfig  # type: ignore[import-untyped]
    from datatrove.utils.text import ngrams, simplify_text  # type: ignore[import-untyped]
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer  # type: ignore[import-untyped]

    class Signature(blocks.MinhashDedupSignature):
        """datatrove's, and of documents with few words as well; with little memory for long ones.

        Words end at spaces: punctuation is gone by then, and spaCy would find the same ones ten times as slowly.
        """

        def get_shingles(self, text: str) -> NDArray[np.uint64]:
            words = (word for part in _windows(text) for word in simplify_text(part, self.config.norm_config).split())
            shingles = np.fromiter((self._hash_func(" ".join(gram)) for gram in ngrams(words, NGRAM)), np.uint64)
            if not len(shingles):  # a copy only of an equal text: no shingle holds a zero byte
                shingles = np.array([self._hash_func("\0" + text)], np.uint64)
            return shingles.reshape(-1, 1)

        def get_signature(self, shingles: NDArray[np.uint64]) -> list[list[int]]:
            signature = super().get_signature
            parts = [signature(shingles[first : first + SHINGLES]) for first in range(0, len(shingles), SHINGLES)]
            return np.array(parts, np.uint64).min(axis=0).tolist()

    hashing = HashConfig(precision=64, hash_fc="sha1")  # its default fails with xxhash 4, which takes no str
    config = blocks.MinhashConfig(n_grams=NGRAM, num_buckets=BUCKETS, hashes_per_bucket=HASHES, hash_config=hashing)
    if task.stage == "signatures":
        return Signature(output, config, WhitespaceTokenizer())  # which it does not use
    if task.stage == "pairs":
        return blocks.MinhashDedupBuckets(str(task.folder / "signatures"), output, config=config, lines_to_buffer=100)
    return blocks.MinhashDedupCluster(str(task.folder / "pairs"), output, config, save_cluster_id=True)


def _windows(text: str) -> Iterator[str]:
    """A text in pieces that end with a space where they can."""
    first = 0
    while first < len(text):
        end = first + WINDOW
        last = (text.rfind(" ", first, end) + 1 if end < len(text) else 0) or end
        yield text[first:last]
        first = last


def _minhash_found(work: Path, num_units: int) -> list[NDArray[np.int64]]:
    """Of a cluster datatrove keeps any one. It numbers clusters as they appear: a number that is no new maximum is a copy."""
    found, highest = list[NDArray[np.int64]](), -1
    for unit in range(num_units):
        path = work / "clusters" / f"{unit:06d}.clusters"
        positions, clusters = (
            np.fromfile(path, "<u4").astype(np.int64).reshape(-1, 2).T if path.exists() else np.empty((2, 0), int)
        )
        before = np.maximum.accumulate(np.append(highest, clusters))
        found.append(positions[clusters <= before[:-1]])
        highest = int(before[-1])
    return found

"""One unit of preparation: some input files -> documents -> tokens -> shards, committed by one record.

A unit is done when `units/<id>.json` is there and its files are as they were. Its shards are written in a folder of its own
and moved into place before that, so that a killed unit leaves nothing that anyone would read. What it refuses to know: other
units, processes, manifests.
"""

import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically
from franca.data.filters import Filters
from franca.data.indexed import ShardWriter, token_dtype
from franca.data.sources import CorpusConfig, Groups, OnBad, read_documents
from franca.data.tokenizer import Tokenizer

FORMAT = 2  # of what a unit writes: raised when the same input gives other bytes
BATCH_CHARACTERS = 2_000_000
GATE_CHARACTERS = 100_000  # of every unit, on which a fast tokenizer must agree with the reference
EXAMINED = 64  # one document of so many is looked at for repetition
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Policy:
    """What decides the tokens of every unit alike."""

    tokenizer: str  # the fingerprint of the dataset's tokenizer.json
    add_bos: bool
    add_eos: bool
    validation_share: float
    shard_tokens: int
    skip_bad: bool


@dataclass(frozen=True)
class Unit:
    """Some files of one source that are prepared together."""

    source: str
    corpus: CorpusConfig
    files: tuple[Path, ...]
    num_bytes: int
    groups: Groups | None = None  # of a large Parquet file: the row groups [first, last) of it
    span: tuple[int, int] | None = None  # their bytes [begin, end)
    copies: tuple[Path, str] | None = None  # the places of copies of other documents, in a .npy file, and its SHA-256

    def id(self, policy: Policy) -> str:
        """Names the unit's record and shards: the same files read in the same way."""
        c = self.corpus
        reading: list[Any] = [c.format, c.field, c.documents, dict(c.where), repr(c.filters), self.groups, self.span]
        reading += [self.copies and self.copies[1], _versions() if c.filters or c.deduplicate else None]
        what = [FORMAT, self.source, list(map(str, self.files)), reading, repr(policy)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@lru_cache
def _versions() -> list[str]:
    """Of the packages that decide which documents are kept."""
    return [f"{d.name} {d.version}" for name in ("datatrove", "spacy") for d in metadata.distributions(name=name)]


def filters_of(corpus: CorpusConfig) -> Filters:
    """Built once for each process: some need seconds to load."""
    return _filters(corpus.filters)


_filters = lru_cache(Filters)


def refuse(reason: str) -> None:
    """What becomes of a bad document unless such ones are skipped."""
    raise ConfigError(f"{reason}. Mend it, or set on_bad_document: skip to leave such documents out and count them.")


def documents(unit: Unit, on_bad: OnBad, dropped: Counter[str], filters: Filters) -> Iterator[str]:
    """The documents of a unit that are kept; the others are counted in `dropped`, by reason."""
    copies = np.empty(0, np.int64) if unit.copies is None else np.load(unit.copies[0], allow_pickle=False)
    number = 0
    for text in chain.from_iterable(read_documents(path, unit.corpus, on_bad, dropped, unit.groups) for path in unit.files):
        kept, reason = filters.apply(text)
        if kept is None:
            dropped[reason] += 1
            continue
        is_copy = bool(len(copies)) and copies[min(copies.searchsorted(number), len(copies) - 1)] == number
        number += 1
        if is_copy:
            dropped[f"deduplicate: {unit.corpus.deduplicate}"] += 1
        else:
            yield kept


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out set: a property of its text alone, the same in every run."""
    return _is_below(_draw(text.encode()), share)


def _is_below(draw: int, share: float) -> bool:
    return draw < share * 2**64


def _draw(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def committed(root: Path, unit: Unit, policy: Policy) -> dict[str, Any] | None:
    """The record of a unit that is done and whose files are as they were: by size and time, or else by content."""
    try:
        record: dict[str, Any] = json.loads((root / "units" / f"{unit.id(policy)}.json").read_text())
    except FileNotFoundError:
        return None
    for path, known in zip(unit.files, record["files"], strict=True):
        if known["sha256"] is None or (known["stat"] != _stat(path) and known["sha256"] != _sha256(path, unit.span)):
            return None
    shards = [root / split / unit.source / shard["name"] for split in SPLITS for shard in record[split]["shards"]]
    return record if all(Path(f"{shard}.{kind}").is_file() for shard in shards for kind in ("bin", "idx")) else None


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path, span: tuple[int, int] | None) -> str | None:
    try:
        begin, end = span or (0, path.stat().st_size)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(begin)
            for place in range(begin, end, 2**20):
                digest.update(file.read(min(2**20, end - place)))
        return digest.hexdigest()
    except OSError:  # a bad document, which was skipped
        return None


def run(root: Path, unit: Unit, policy: Policy, tick: Callable[[int], None]) -> dict[str, Any]:
    """Prepare a unit under `root` and commit it; returns its record. `tick` is told how many tokens are new, batch by batch.

    Raises ConfigError for a bad document (unless they are skipped), or when a file changes while it is read.
    """
    name = unit.id(policy)
    work = (
        root / "units" / f"{name}.{socket.gethostname()}.{os.getpid()}.partial"
    )  # not shared with a worker of a killed attempt that still breathes
    shutil.rmtree(work, ignore_errors=True)
    (root / "units" / f"{name}.json").unlink(missing_ok=True)  # what it tells of is about to be replaced
    for path in (path for split in SPLITS for path in (root / split / unit.source).glob(f"{name}-*")):
        path.unlink()  # now, for its room
    tokenizer = _tokenizer(root / "tokenizer.json", policy.tokenizer)
    stats = [_stat(path) for path in unit.files]
    splits = {split: _Split(work / split, name, tokenizer.vocab_size, policy.shard_tokens) for split in SPLITS}
    skipped, dropped = list[str](), Counter[str]()

    def skip(reason: str) -> None:
        if not policy.skip_bad:
            refuse(reason)
        skipped.append(reason)

    filters = filters_of(unit.corpus)
    try:
        for number, batch in enumerate(_batches(documents(unit, skip, dropped, filters))):
            if number == 0:
                tokenizer.accelerate(_sample(batch))
            tick(_add(batch, tokenizer, policy, splits, filters, dropped))
        for written in splits.values():
            written.close()
        for path, stat in zip(unit.files, stats, strict=True):
            if _stat(path) != stat:
                raise ConfigError(f"{path}: has changed while it was read. Run the same command again when it is at rest.")
        files = [{"path": str(p), "stat": s, "sha256": _sha256(p, unit.span)} for p, s in zip(unit.files, stats, strict=True)]
        facts = {split: written.facts for split, written in splits.items()}
        left_out = {"skipped": len(skipped), "first_skipped": skipped[:10], "dropped": dict(sorted(dropped.items()))}
        record = {"source": unit.source, "files": files, **left_out, **facts}
        for split in SPLITS:
            _move(work / split, root / split / unit.source)
        write_atomically(root / "units" / f"{name}.json", json.dumps(record))
    finally:
        for written in splits.values():
            written.abandon()
        shutil.rmtree(work, ignore_errors=True)  # of a failure, too: the disk may be full of it
    return record


@lru_cache(maxsize=1)
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    assert tokenizer.fingerprint == fingerprint
    return tokenizer


def _sample(batch: list[str]) -> list[str]:
    """Documents from all over a batch, cut so that they are few characters together."""
    step = -(-len(batch) // 50)
    some = batch[::step]
    return [text[: GATE_CHARACTERS // len(some)] for text in some]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH_CHARACTERS: the tokenizer works on many at once."""
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _add(
    batch: list[str],
    tokenizer: Tokenizer,
    policy: Policy,
    splits: dict[str, "_Split"],
    filters: Filters,
    dropped: Counter[str],
) -> int:
    """The documents of a batch, each to its split; returns how many tokens they have."""
    contents = [text.encode() for text in batch]
    draws = [_draw(content) for content in contents]
    held_out = np.array([_is_below(draw, policy.validation_share) for draw in draws])
    ids, lengths = tokenizer.encode_flat(batch, policy.add_bos, policy.add_eos)
    sizes = np.fromiter(map(len, contents), np.int64, len(contents))
    few = lengths < filters.min_tokens
    many = lengths > filters.max_tokens if filters.max_tokens is not None else np.zeros_like(few)
    kept = ~(few | many)
    for reason, those in ((f"fewer than {filters.min_tokens:,}", few), (f"more than {filters.max_tokens or 0:,}", many)):
        if those.any():
            dropped[f"length: {reason} tokens"] += int(those.sum())
    for split, mine in (("train", ~held_out & kept), ("validation", held_out & kept)):
        if mine.any():
            of_split = ids if mine.all() else ids[np.repeat(mine, lengths)]
            splits[split].add(of_split, lengths[mine], int(sizes[mine].sum()))
    for text, draw, out, stays in zip(batch, draws, held_out.tolist(), kept.tolist(), strict=True):
        if draw % EXAMINED == 0 and stays:
            splits["validation" if out else "train"].examine(text)
    return len(ids)


class _Split:
    """The training or the held-out half of a unit: shard after shard, and `facts`, its entry of the record."""

    def __init__(self, folder: Path, name: str, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, token_dtype(vocab_size), shard_tokens
        self.writer: ShardWriter | None = None
        names = ("documents", "tokens", "bytes", "examined", "lines", "repeated_lines", "one_character")
        self.facts: dict[str, Any] = {**dict.fromkeys(names, 0), "lengths": [0] * 40, "shards": []}

    def add(self, ids: NDArray[Any], lengths: NDArray[np.int64], num_bytes: int) -> None:
        """Append documents: their tokens back to back, and how many each has."""
        for name, count in (("documents", len(lengths)), ("tokens", len(ids)), ("bytes", num_bytes)):
            self.facts[name] += count
        powers = np.frexp(lengths.astype(np.float64))[1]  # [2^(n-1), 2^n) tokens: n
        self.facts["lengths"] = (self.facts["lengths"] + np.bincount(powers, minlength=40)).tolist()
        while len(lengths):
            if self.writer is None:
                self.writer = ShardWriter(self.folder / f"{self.name}-{len(self.facts['shards']):03d}", self.dtype)
            ends = self.writer.num_tokens + np.cumsum(lengths)
            count = min(int(np.searchsorted(ends, self.shard_tokens)) + 1, len(lengths))
            tokens = int(lengths[:count].sum())
            self.writer.add(ids[:tokens], lengths[:count])
            ids, lengths = ids[tokens:], lengths[count:]
            if self.writer.num_tokens >= self.shard_tokens:
                self.close()

    def examine(self, text: str) -> None:
        """Count what a person should be warned of: repeated lines, documents of nearly one character."""
        lines = [line for line in text.splitlines() if line.strip()]
        facts = self.facts
        facts["examined"] += 1
        facts["lines"] += len(lines)
        facts["repeated_lines"] += len(lines) - len(set(lines))
        head = text[:10_000]
        facts["one_character"] += len(head) >= 100 and Counter(head).most_common(1)[0][1] > 0.7 * len(head)

    def close(self) -> None:
        """End the shard that is being written, if there is one."""
        if self.writer is not None:
            entry = {"name": self.writer.prefix.name, "tokens": self.writer.num_tokens, "sha256": self.writer.commit()}
            self.facts["shards"].append(entry)
            self.writer = None

    def abandon(self) -> None:
        """Close what a failure left open."""
        if self.writer is not None:
            with suppress(OSError):  # what is still to be written finds the disk as full
                self.writer.file.close()


def _move(source: Path, target: Path) -> None:
    """The shards of a unit into their place; an index comes after its tokens."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*"), key=lambda path: path.suffix):  # .bin before .idx
        os.replace(path, target / path.name)
    sync_folder(target)


def gather(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a source has become, for the manifest, from the records of its units in order."""
    entry: dict[str, Any] = {"skipped": sum(record["skipped"] for record in records)}
    entry["first_skipped"] = [reason for record in records for reason in record["first_skipped"]][:10]
    entry["dropped"] = dict(sum((Counter(record["dropped"]) for record in records), Counter[str]()))
    for split in SPLITS:
        parts = [record[split] for record in records]
        counts = {name: sum(part[name] for part in parts) for name in parts[0] if isinstance(parts[0][name], int)}
        shards = [shard for part in parts for shard in part["shards"]]
        lengths = np.sum([part["lengths"] for part in parts], axis=0).tolist()
        entry[split] = {**counts, "lengths": lengths[: 1 + max(np.flatnonzero(lengths), default=-1)], "shards": shards}
    return entry

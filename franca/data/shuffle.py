"""A global shuffle of documents that do not fit in memory: a sort by a keyed hash of where every row comes from.

The key of a row is 64 bits of (seed, file name below the folder that all inputs share, line number); rows with the same key
stand in the order of files and lines. So the result is a function of seed, inputs, `num_chunks` and `validation_share`: not of
memory, workers or restarts. Keys below `validation_share` * 2^64 are the validation set; the range above is cut into
`num_chunks` equal ones, a chunk each: validation set and chunks are uniform random subsets, and chunks differ by chance only.

    scatter    an input file -> a spill: batches that fit in memory, each sorted by key, with an index of keys and places
    gather     a range of keys that fits in memory, out of every batch -> sorted -> a chunk -> copied, and the copy read back

Every file gets its name when it is whole, and what has a record is not made again: that is all there is to resuming.
What it refuses to know: tokens. Every line is parsed, to be sure that it is a JSON object, and passed on as it is. A line may
have half as many bytes as a worker has memory; while one so long is parsed, more than that is used.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from franca import __version__
from franca.core.config import BelowOne, Count, config, differences, load, to_dict
from franca.core.errors import ConfigError, disk_errors
from franca.core.progress import progress
from franca.core.run import lock, new_file, write_atomically
from franca.core.workers import pool, wait_for_workers
from franca.data.order import hash64
from franca.data.sources import UNREADABLE, CorpusConfig, OnBad, find_files, kind_of, open_file, read_documents

Keys = NDArray[np.uint64]
Facts = dict[str, Any]

MIN_BYTES = 1_000_000  # of memory for one worker
ROW_BYTES = 64  # that a row takes, beside its text
MEND = "Mend it, or set on_bad_document: skip to leave such documents out and count them"


def parse_bytes(size: Any) -> int:
    """'4 GB', '512 MiB' or a number as a number of bytes. Raises ValueError that says what was given and what is allowed."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kKMGT]?)(i?)B", str(size))
    if match:
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if type(size) is int:
        return size
    raise ValueError(f"{size!r} is not a size, for example '4 GB' or '512 MiB'")


@config
class ShuffleConfig:
    """`franca prepare shuffle`: files of documents, of any format, into shuffled chunks of JSON lines.

    Lines of JSON are kept as they are; of tables and plain text the text is kept.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]  # of the output files: <name>.chunk.NN.jsonl, <name>.val.jsonl
    paths: Annotated[tuple[str, ...], Field(min_length=1)]  # globs, `**` for any depth
    final_dir: str  # where the chunks go; may be slow
    tmp_dir: str  # a fast disk with room for all text and `workers` chunks; the work is in its folder <name>.shuffle
    hub: str | None = None  # `owner/name` of a Hugging Face dataset: `paths` of it are brought to <name>.download in tmp_dir
    revision: str = "main"
    field: str | None = None  # the column of tables; None: `text`, else `content`
    memory: Annotated[int, BeforeValidator(parse_bytes)]  # of all workers together
    num_chunks: Count = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validation_share: BelowOne = 0.001  # of the documents, about
    documents: Literal["file", "paragraph", "line"] = "file"  # that plain text is cut into
    clear_tmp: bool = True  # remove the spills at the end, and each chunk there when its copy has been read back
    workers: Count = 1
    on_bad_document: Literal["error", "skip"] = "error"


def main(path: Path, words: list[str]) -> None:
    """The command: shuffle, and report."""
    report(shuffle(load(ShuffleConfig, path, words)))


@dataclass(frozen=True)
class Work:
    """What every process must know. `files` by their names below the folder that they share, in order."""

    settings: ShuffleConfig
    files: dict[str, Path]
    folder: Path
    final: Path

    def path(self, item: str, kind: Literal["spill", "chunk", "json"]) -> Path:
        """A file of the work folder; the record, json, of an input or output file is there when that one is done."""
        return self.folder / f"{hashlib.blake2b(item.encode(), digest_size=8).hexdigest()}.{kind}"

    def record(self, item: str) -> Facts:
        return orjson.loads(self.path(item, "json").read_bytes())

    @cached_property
    def parts(self) -> dict[str, tuple[int, int]]:
        """The keys [low, high) that go into each file of `final`."""
        name, count, threshold = self.settings.name, self.settings.num_chunks, int(self.settings.validation_share * 2**64)
        edges = [threshold + (2**64 - threshold) * number // count for number in range(count + 1)]
        digits = max(2, len(str(count - 1)))
        chunks = {f"{name}.chunk.{i:0{digits}d}.jsonl": (edges[i], edges[i + 1]) for i in range(count)}
        return ({f"{name}.val.jsonl": (0, threshold)} if threshold else {}) | chunks

    @property
    def limit(self) -> int:
        """Bytes of text and arrays to hold at once: half of a worker's share, the rest is for copies."""
        return self.settings.memory // self.settings.workers // 2


Task = Callable[[Work, str], Facts]


def shuffle(settings: ShuffleConfig) -> Path:
    """Make the chunks and `shuffle.json` (last) in `final_dir`, or find them made; returns that folder.

    Raises ConfigError for bad settings, for lines that are no JSON object (unless they are skipped), for files that cannot
    be read or written, and for folders that hold another shuffle. After any end it goes on where it was.
    """
    with disk_errors(Path(settings.tmp_dir)):
        return _shuffle(settings)


def _shuffle(settings: ShuffleConfig) -> Path:
    if settings.memory < MIN_BYTES * settings.workers:
        raise ConfigError(f"memory: is {settings.memory:,} bytes; each of {settings.workers} worker(s) needs {MIN_BYTES:,}")
    tmp, final = (Path(os.path.abspath(os.path.expanduser(place))) for place in (settings.tmp_dir, settings.final_dir))
    work = Work(settings, _list_files(settings), tmp / f"{settings.name}.shuffle", final)
    plan = _plan(work)
    with _locked(work):
        if not (final / "shuffle.json").exists():
            _agree(work, plan)
            spills = _run("scatter", _scatter, work, {name: facts["bytes"] for name, facts in plan["files"].items()})
            _refuse_skipped_and_empty(work, spills)
            chunks = _run("gather", _gather, work, {name: high - low for name, (low, high) in work.parts.items()})
            rows, rows_out = (sum(facts["rows"] for facts in records.values()) for records in (spills, chunks))
            assert rows == rows_out, f"{rows} rows became {rows_out}"
            first = [reason for facts in spills.values() for reason in facts["first_skipped"]][:10]
            manifest = {"franca": __version__, "settings": to_dict(settings), "plan": plan, "rows": rows, "chunks": chunks}
            manifest |= {"skipped": sum(facts["skipped"] for facts in spills.values()), "first_skipped": first}
            manifest["files"] = {name: plan["files"][name] | {"rows": facts["rows"]} for name, facts in spills.items()}
            write_atomically(final / "shuffle.json", json.dumps(manifest, indent=2))
        made = orjson.loads((final / "shuffle.json").read_bytes())["plan"]
        _refuse_change(final, made, plan, "Choose another final_dir, or remove what is there")
        if settings.clear_tmp:
            shutil.rmtree(work.folder)
    return final


def _list_files(settings: ShuffleConfig) -> dict[str, Path]:
    patterns = settings.paths
    if settings.hub is not None:
        from franca.data.hub import bring  # a client that others need not load

        folder = Path(settings.tmp_dir).expanduser() / f"{settings.name}.download"
        patterns = bring(settings.hub, folder, patterns, settings.revision)
    paths = sorted({Path(os.path.abspath(file)) for file in find_files("paths", patterns)})
    root = os.path.commonpath([path.parent for path in paths])
    return {path.relative_to(root).as_posix(): path for path in paths}


def _plan(work: Work) -> Facts:
    """All that the result depends on."""
    for path in work.files.values():
        if path.parent == work.final or path.is_relative_to(work.folder):
            raise ConfigError(f"paths: {path} lies where the shuffle writes. Keep inputs and outputs apart")
    facts = {
        key: getattr(work.settings, key) for key in ("name", "seed", "num_chunks", "validation_share", "documents", "field")
    }
    stats = {name: path.stat() for name, path in work.files.items()}
    files = {name: {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}
    return {"format": 1, **facts, "files": files}


def _refuse_change(place: Path, old: Facts, new: Facts, advice: str) -> None:
    if changes := differences(old, new):
        shown = "\n  ".join(f"{key}: was {before}, is {after}" for key, before, after in changes[:8])
        raise ConfigError(f"{place}: holds another shuffle ({len(changes)} difference(s)). {advice}.\n  {shown}")


@contextmanager
def _locked(work: Work) -> Iterator[None]:
    """Make both folders, and keep other processes out of the work folder."""
    for place in (work.folder, work.final):
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise ConfigError(
                f"{place}: cannot be written ({error.strerror}). Set tmp_dir and final_dir to other places"
            ) from None
    advice = "Wait for it, or choose another tmp_dir"
    with lock(work.folder / ".lock", f"{work.folder}: another process is shuffling here. {advice}"):
        wait_for_workers(work.folder)
        yield


def _agree(work: Work, plan: Facts) -> None:
    """Begin, or go on with the same plan. Removes what killed processes left half written."""
    path, name = work.folder / "plan.json", work.settings.name
    if path.exists():
        advice = f"Undo the change, or choose another tmp_dir, or remove {work.folder} and what it made in {work.final}"
        _refuse_change(work.folder, orjson.loads(path.read_bytes()), plan, advice)
    elif others := [*work.final.glob(f"{name}.chunk.*.jsonl"), *work.final.glob(f"{name}.val.jsonl")]:
        raise ConfigError(f"{min(others)}: is of another shuffle. Remove it, or choose another final_dir")
    write_atomically(path, json.dumps(plan))
    left = [
        work.folder.glob(".*.partial"),
        *(work.final.glob(f".{begin}.*.partial") for begin in (*work.parts, "shuffle.json")),
    ]
    for path in [path for paths in left for path in paths]:
        path.unlink()
    for part in work.parts:
        if not (work.final / part).exists():  # whatever its record says
            work.path(f"gather {part}", "json").unlink(missing_ok=True)


def _run(stage: str, task: Task, work: Work, sizes: dict[str, int]) -> dict[str, Facts]:
    """Do the task for every item that has no record, the largest first; returns the records of all."""
    items = sorted((i for i in sizes if not work.path(f"{stage} {i}", "json").exists()), key=lambda item: -sizes[item])
    with progress(stage, sum(sizes[item] for item in items)) as show:
        done = 0
        for count, item in enumerate(_finished(stage, task, work, items), 1):
            done += sizes[item]
            show(done, f"{count:,} of {len(items):,} files")
    return {item: work.record(f"{stage} {item}") for item in sizes}


def _finished(stage: str, task: Task, work: Work, items: list[str]) -> Iterator[str]:
    """Items, each when it is done. A worker that fails stops the others after what they are at."""
    if work.settings.workers == 1:
        yield from (_do(stage, task, work, item) for item in items)
        return
    with pool(work.settings.workers, work.folder, work.folder) as processes:
        futures = [processes.submit(_do, stage, task, work, item) for item in items]
        yield from (future.result() for future in as_completed(futures))


def _do(stage: str, task: Task, work: Work, item: str) -> str:
    write_atomically(work.path(f"{stage} {item}", "json"), json.dumps(task(work, item)))
    return item


def row_keys(seed: int, name: str, rows: Keys) -> Keys:
    """The keys of rows of a file: uniform, and independent of those of other files."""
    low, high = np.frombuffer(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "<u8")
    return hash64(hash64(rows + low) ^ high)


def _scatter(work: Work, name: str) -> Facts:
    """Make the spill of an input file, batch after batch."""
    path, facts, before = work.files[name], Facts(rows=0, skipped=0, first_skipped=[], batches=[]), work.files[name].stat()

    def on_bad(reason: str) -> None:
        if work.settings.on_bad_document == "error":
            raise ConfigError(f"{reason}. {MEND}")
        facts["skipped"] += 1
        facts["first_skipped"] = [*facts["first_skipped"], reason][:10]

    with new_file(work.path(f"scatter {name}", "spill")) as spill:
        numbers, lines, held = array("Q"), list[bytes](), 0
        for number, line in _read_lines(path, work, on_bad):
            numbers.append(number)
            lines.append(line)
            held += len(line) + ROW_BYTES
            if held > work.limit:
                facts["batches"].append(_spill(spill, work.settings.seed, name, numbers, lines))
                numbers, lines, held = array("Q"), [], 0
        if lines:
            facts["batches"].append(_spill(spill, work.settings.seed, name, numbers, lines))
    facts["rows"] = sum(rows for _, rows in facts["batches"])
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ConfigError(f"{path}: was changed while it was read. Shuffle files that nobody writes to")
    return facts


def _spill(file: IO[bytes], seed: int, name: str, numbers: "array[int]", lines: list[bytes]) -> tuple[int, int]:
    """Write a batch, sorted: keys (uint64), ends of rows in the spill (uint64), text; returns where it begins, and its rows."""
    keys = row_keys(seed, name, np.frombuffer(numbers, np.uint64))
    order = np.argsort(keys, kind="stable")
    sizes = np.fromiter(map(len, lines), np.int64, len(lines))[order]
    file.write(bytes(-file.tell() % 8))  # an index off its words would be copied before each search
    begin = file.tell()
    file.write(keys[order].astype("<u8").data)
    file.write((np.cumsum(sizes) + (begin + 16 * len(order))).astype("<u8").data)
    file.writelines(map(lines.__getitem__, order.data))
    return begin, len(order)


@contextmanager
def _open_lines(path: Path, work: Work, on_bad: OnBad) -> Iterator[Iterator[bytes]]:
    """JSON lines as they are, cut where they are too long; other documents as JSON lines."""
    corpus = CorpusConfig(paths=(), field=work.settings.field, documents=work.settings.documents)
    kind, size = kind_of(path, corpus), path.stat().st_size
    if kind == "jsonl":
        if size == 0:
            on_bad(f"{path}: is an empty file")
        with open_file(path) as file:
            yield iter(partial(file.readline, work.limit + 1), b"")
        return
    needed = size * (40 if path.suffix in (".gz", ".zst") else 8)
    if kind == "text" and work.settings.documents == "file" and needed > work.limit:
        advice = f"Make JSON lines of it, or set memory to {2 * work.settings.workers * needed:,} bytes"
        raise ConfigError(f"{path}: is too much plain text to be held at once. {advice}")
    yield (orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in read_documents(path, corpus, on_bad))


def _read_lines(path: Path, work: Work, on_bad: OnBad) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are JSON objects, with their numbers; they end with \\n. Blank ones are left out silently."""
    number, limit = 0, work.limit
    with _open_lines(path, work, on_bad) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if len(line) > limit:
                    advice = "Cut it, or give more memory, or use fewer workers"
                    raise ConfigError(f"{path}:{number}: a line of more than {limit:,} bytes does not fit. {advice}")
                if line.endswith(b"\r\n") or not line.endswith(b"\n"):
                    line = line.removesuffix(b"\n").removesuffix(b"\r") + b"\n"
                try:
                    if type(orjson.loads(line)) is dict:
                        yield number - 1, line
                        continue
                    reason = "is no object"
                except orjson.JSONDecodeError as error:
                    reason = f"is not JSON ({error})"
                if line.strip():
                    on_bad(f"{path}:{number}: {reason}; JSON lines are expected: one whole object on every line")
        except UNREADABLE as error:
            on_bad(f"{path}: cannot be read past line {number} ({error}): truncated or not what its name says")


class Run(NamedTuple):
    """Rows [begin, end) of a batch of `num_rows` with its index `at` that byte of a spill, and where their text lies."""

    spill: Path
    at: int
    num_rows: int
    begin: int
    end: int
    text_begin: int
    text_end: int

    @property
    def table(self) -> Keys:
        """Keys, and ends in the spill: (2, num_rows). Mapped: only what is looked at is read."""
        return np.memmap(self.spill, "<u8", "r", self.at, (2, self.num_rows)).view(np.ndarray)

    def cut(self, low: int, high: int) -> "Run":
        """The rows with keys in [low, high)."""
        keys, ends = self.table
        begin = int(np.searchsorted(keys, np.uint64(low)))
        end = int(np.searchsorted(keys, np.uint64(high - 1), side="right"))
        texts = [int(ends[row - 1]) if row else self.at + 16 * self.num_rows for row in (begin, end)]
        return self._replace(begin=begin, end=end, text_begin=texts[0], text_end=texts[1])


def _runs(work: Work) -> list[Run]:
    """All batches, in the order of files and lines."""
    spills = {work.path(f"scatter {name}", "spill"): work.record(f"scatter {name}")["batches"] for name in work.files}
    return [Run(spill, at, rows, 0, rows, 0, 0) for spill, batches in spills.items() for at, rows in batches]


def _refuse_skipped_and_empty(work: Work, spills: dict[str, Facts]) -> None:
    """Refuse what an earlier attempt was told to skip, and to make an empty file: readers of such files wait for ever."""
    skipped = [facts["first_skipped"][0] for facts in spills.values() if facts["skipped"]]
    if skipped and work.settings.on_bad_document == "error":
        raise ConfigError(f"{skipped[0]}. An earlier attempt skipped it. {MEND}, or remove {work.folder}")
    edges = np.array([low for low, _ in work.parts.values()], np.uint64)
    counts = np.zeros(len(edges), np.int64)
    for run in _runs(work):
        counts += np.diff(np.searchsorted(run.table[0], edges), append=run.num_rows)
    for name, count in zip(work.parts, counts, strict=True):
        if not count:
            advice = "Give more documents, fewer chunks, or another validation_share (0 for no such file)"
            raise ConfigError(f"{name}: none of {counts.sum():,} documents would be in it. {advice}")


def _gather(work: Work, name: str) -> Facts:
    """Make an output file in the work folder, unless it is there, and bring it to its final folder."""
    chunk = work.path(f"gather {name}", "chunk")
    if not chunk.exists():
        with new_file(chunk) as file:
            for runs in _buckets(_runs(work), *work.parts[name], work.limit + ROW_BYTES):  # the longest line fits
                file.writelines(_sorted_rows(runs))
    facts = _ship(chunk, work.final / name)
    if work.settings.clear_tmp:
        chunk.unlink()
    return facts


def _buckets(runs: list[Run], low: int, high: int, limit: int) -> Iterator[list[Run]]:
    """What has keys in [low, high), range after range of them, each of at most `limit` bytes."""
    runs = [run for run in (run.cut(low, high) for run in runs) if run.end > run.begin]
    if sum(run.text_end - run.text_begin + ROW_BYTES * (run.end - run.begin) for run in runs) > limit and high - low > 1:
        middle = (low + high) // 2
        yield from _buckets(runs, low, middle, limit)
        yield from _buckets(runs, middle, high, limit)
    elif runs:
        yield runs


def _sorted_rows(runs: list[Run]) -> Iterator[memoryview]:
    """The rows of all runs by key and then in the order of runs."""
    text, fill = np.empty(sum(run.text_end - run.text_begin for run in runs), np.uint8).data, 0
    keys, ends = list[Keys](), [np.zeros(1, np.int64)]
    for run in runs:
        chosen, stop = run.table[:, run.begin : run.end], fill + run.text_end - run.text_begin
        keys.append(chosen[0].copy())
        ends.append(chosen[1].astype(np.int64) - (run.text_begin - fill))
        with open(run.spill, "rb") as file:
            file.seek(run.text_begin)
            if file.readinto(text[fill:stop]) < stop - fill:
                raise ConfigError(f"{run.spill}: is truncated. Remove {run.spill.parent} and begin anew")
        fill = stop
    order, edges = np.argsort(np.concatenate(keys), kind="stable"), np.concatenate(ends)
    return (text[begin:end] for begin, end in zip(edges[order].data, edges[order + 1].data, strict=True))


def _ship(chunk: Path, target: Path) -> Facts:
    """Copy a file; the copy gets its name when the disk has given back the bytes that were written."""
    digest, num_bytes, rows = hashlib.sha256(), 0, 0
    with new_file(target) as file, open(chunk, "rb") as source:
        while piece := source.read(1 << 18):
            digest.update(piece)
            rows += piece.count(b"\n")
            num_bytes += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would answer for the disk
        with open(file.name, "rb") as copy:
            if hashlib.file_digest(copy, "sha256").digest() != digest.digest():
                advice = "Is a disk failing? Run the same command again to copy it again"
                raise ConfigError(f"{target}: reads back other bytes than were written. {advice}")
    return {"rows": rows, "bytes": num_bytes, "sha256": digest.hexdigest()}


def report(final: Path) -> None:
    """Print what a folder of shuffled chunks holds."""
    made = orjson.loads((final / "shuffle.json").read_bytes())
    num_bytes = sum(chunk["bytes"] for chunk in made["chunks"].values())
    print(f"{final}: {made['rows']:,} documents, {num_bytes:,} bytes in {len(made['chunks'])} file(s)")
    if made["skipped"]:
        print(f"  {made['skipped']:,} bad document(s) skipped, the first: {made['first_skipped'][0]}")

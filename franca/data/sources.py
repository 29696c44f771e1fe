"""Documents out of files: plain text, JSON lines and CSV, plain or compressed (.gz, .zst), Parquet and Arrow.

What it refuses to know: tokens. A message names the file and line of what cannot be read.
"""

import csv
import glob
import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

import orjson
from backports import zstd

from franca.core.config import config
from franca.core.errors import ConfigError

FIELDS = ("text", "content")
SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".ipc"), "arrow"),
}
# What files and compressed streams raise for bytes that are not what they should be, an end in the middle among them.
UNREADABLE = (OSError, EOFError, zlib.error, zstd.ZstdError)


@config
class CorpusConfig:
    """One corpus. `paths` are globs (`**` for any depth); `documents` says where plain text is cut into documents."""

    paths: tuple[str, ...]
    hub: str | None = None  # `owner/name` of a Hugging Face dataset: `paths` are then patterns of its files
    revision: str = "main"
    exclude: tuple[str, ...] = ()
    format: Literal["auto", "text", "jsonl", "csv", "arrow"] = "auto"  # auto: by the name's ending
    field: str | None = None  # of a JSON line, or the column; None: `text`, else `content`
    documents: Literal["file", "paragraph", "line"] = "file"


OnBad = Callable[[str], None]
Fields = tuple[str, ...]


def list_files(name: str, corpus: CorpusConfig) -> list[Path]:
    """The files of a corpus in sorted order. Raises ConfigError when a pattern matches nothing."""

    def find(pattern: str) -> set[str]:
        return set(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))

    files: set[str] = set()
    for pattern in corpus.paths:
        if not (found := find(pattern)):
            raise ConfigError(f"sources.{name}.paths: {pattern!r} matches no file. Is the path right, seen from {os.getcwd()}?")
        files |= found
    files.difference_update(*map(find, corpus.exclude))
    if not files:
        raise ConfigError(f"sources.{name}: `exclude` leaves no file of {', '.join(corpus.paths)}")
    return [Path(path) for path in sorted(files)]


def read_documents(path: Path, corpus: CorpusConfig, on_bad: OnBad) -> Iterator[str]:
    """The documents of one file. What cannot be read as a document goes to `on_bad(reason)`, which may raise."""
    if path.stat().st_size == 0:
        on_bad(f"{path}: is an empty file")
        return
    unpacked = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    kind = corpus.format if corpus.format != "auto" else SUFFIXES.get(unpacked.suffix, "text")
    fields = FIELDS if corpus.field is None else (corpus.field,)
    if kind == "text":
        yield from _read_text(path, corpus.documents, on_bad)
    else:
        yield from {"jsonl": _read_json_lines, "csv": _read_csv}.get(kind, _read_arrow)(path, fields, on_bad)


def open_file(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {".gz": gzip.open, ".zst": zstd.open}
    return cast(IO[bytes], openers.get(path.suffix, open)(path, "rb"))


def _read_json_lines(path: Path, fields: Fields, on_bad: OnBad) -> Iterator[str]:
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    record = orjson.loads(line)
                except orjson.JSONDecodeError as error:
                    on_bad(f"{place}: is not JSON ({error}); JSON lines are expected: one whole object on every line")
                    continue
                text = next((record[key] for key in fields if key in record), None) if isinstance(record, dict) else None
                if isinstance(text, str):
                    yield text
                else:
                    on_bad(f"{place}: has no text under {_named(fields)}")
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read past line {number} ({error}): truncated or not compressed as its name says")


def _named(fields: Fields) -> str:
    return " or ".join(map(repr, fields))


def _read_csv(path: Path, fields: Fields, on_bad: OnBad) -> Iterator[str]:
    """The named column of comma- or (.tsv) tab-separated values with a line of names at the top."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    rows = None
    try:
        with open_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            column = next((name for name in fields if name in (rows.fieldnames or ())), None)
            if column is None:
                on_bad(f"{path}: has no column {_named(fields)}, only {', '.join(rows.fieldnames or ())}")
                return
            for row in rows:
                if row[column] is None:
                    on_bad(f"{path}:{rows.line_num}: has no text in column {column!r}")
                else:
                    yield row[column]
    except (*UNREADABLE, UnicodeDecodeError, csv.Error) as error:
        on_bad(f"{path}: cannot be read past line {rows.line_num if rows else 0} ({error})")


def _read_arrow(path: Path, fields: Fields, on_bad: OnBad) -> Iterator[str]:
    """The named column of a Parquet file, or of an Arrow file or stream; no other column is read."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError(f"{path}: Parquet and Arrow files need pyarrow; run: pip install 'franca[data]'") from None
    number = 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            if path.suffix == ".parquet":
                table: Any = parquet.ParquetFile(file)
                names, batches = table.schema_arrow.names, lambda name: table.iter_batches(1024, columns=[name])
            else:
                magic = file.read(6)
                file.seek(0)
                table = pyarrow.ipc.open_file(file) if magic == b"ARROW1" else pyarrow.ipc.open_stream(file)
                names, batches = table.schema.names, lambda name: _arrow_batches(table)
            column = next((name for name in fields if name in names), None)
            if column is None:
                on_bad(f"{path}: has no column {_named(fields)}, only {', '.join(names)}")
                return
            for batch in batches(column):
                for place, text in enumerate(batch.column(column).to_pylist(), number + 1):
                    if isinstance(text, str):
                        yield text
                    else:
                        on_bad(f"{path}: row {place} has no text in column {column!r}")
                number += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
        on_bad(f"{path}: cannot be read past row {number} ({error})")


def _arrow_batches(table: Any) -> Iterator[Any]:
    yield from (table.get_batch(i) for i in range(table.num_record_batches)) if hasattr(table, "get_batch") else table


def _read_text(path: Path, documents: str, on_bad: OnBad) -> Iterator[str]:
    try:
        # Lines as editors count them, ends kept; `splitlines` would also cut at form feeds and at U+2028.
        with open_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="\n") as text:
            if documents == "file":
                yield text.read()
            elif documents == "line":
                yield from filter(str.strip, text)
            else:
                yield from _paragraphs(text)
    except UnicodeDecodeError as error:
        on_bad(f"{path}: is not UTF-8 text ({error.object[error.start :][:1]!r}: {error.reason})")
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read ({error})")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Stretches of lines between blank lines, the blank lines kept with the paragraph before them."""
    paragraph, blank = "", False
    for line in lines:
        if line.strip() and blank and paragraph.strip():
            yield paragraph
            paragraph = ""
        paragraph += line
        blank = not line.strip()
    if paragraph.strip():
        yield paragraph

"""Documents out of files: plain text, JSON lines and CSV, plain or compressed (.gz, .zst), Parquet and Arrow.

What it refuses to know: tokens. A message names the file and line of what cannot be read.
"""

import csv
import dataclasses
import glob
import gzip
import io
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import IO, Any, Literal, cast

import orjson
from backports import zstd

from franca.core.config import config
from franca.core.errors import ConfigError
from franca.data.filters import FilterConfig

FIELDS = ("text", "content")
SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".ipc"), "arrow"),
}
# What files and compressed streams raise for bytes that are not what they should be, an end in the middle among them.
UNREADABLE = (OSError, EOFError, zlib.error, zstd.ZstdError)


Plain = str | int | float | bool


@config
class CorpusConfig:
    """One corpus. `paths` are globs (`**` for any depth); `documents` says where plain text is cut into documents."""

    paths: tuple[str, ...]
    hub: str | None = None  # `owner/name` of a Hugging Face dataset: `paths` are then patterns of its files
    revision: str = "main"
    exclude: tuple[str, ...] = ()
    format: Literal["auto", "text", "jsonl", "csv", "arrow"] = "auto"  # auto: by the name's ending
    field: str | None = None  # of a JSON line, or the column; None: `text`, else `content`
    where: dict[str, Plain | tuple[Plain, ...]] = dataclasses.field(default_factory=dict)  # rows to read: {lang: [en, eu]}
    documents: Literal["file", "paragraph", "line"] = "file"
    filters: tuple[FilterConfig, ...] = ()  # one after the other
    deduplicate: Literal["exact", "minhash"] | None = None  # among the documents of this corpus, after the filters


OnBad = Callable[[str], None]
Fields = tuple[str, ...]
Groups = tuple[int, int]  # row groups [first, last)


def list_files(name: str, corpus: CorpusConfig) -> list[Path]:
    """The files of a corpus in sorted order. Raises ConfigError when a pattern matches nothing."""
    files = find_files(f"sources.{name}.paths", corpus.paths, corpus.exclude)
    if not files:
        raise ConfigError(f"sources.{name}: `exclude` leaves no file of {', '.join(corpus.paths)}")
    return [Path(path) for path in sorted(files)]


def find_files(where: str, patterns: tuple[str, ...], exclude: tuple[str, ...] = ()) -> set[str]:
    """What globs match, without folders. Raises ConfigError for what would be left out in silence, or waited for."""
    found = {pattern: _glob(pattern) for pattern in patterns}
    if nothing := [pattern for pattern, files in found.items() if not files]:
        raise ConfigError(f"{where}: {nothing[0]!r} matches no file. Is the path right, seen from {os.getcwd()}?")
    paths = set[str]().union(*found.values()).difference(*map(_glob, exclude))
    if odd := sorted(path for path in paths if not os.path.isfile(path)):  # pipes, sockets, devices
        what = "a link to nothing" if os.path.islink(odd[0]) else "no regular file"
        advice = "Mend or remove it, or do not name it"
        raise ConfigError(f"{where}: {odd[0]} is {what} ({len(odd)} such of {len(paths)}). {advice}")
    return paths


def _glob(pattern: str) -> set[str]:
    return {path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if not os.path.isdir(path)}


def read_documents(
    path: Path, corpus: CorpusConfig, on_bad: OnBad, dropped: Counter[str] | None = None, groups: Groups | None = None
) -> Iterator[str]:
    """The documents of one file, or of the row groups [first, last) of a Parquet file.

    What cannot be read as a document goes to `on_bad(reason)`, which may raise; what `where` leaves out is counted.
    """
    if path.stat().st_size == 0:
        on_bad(f"{path}: is an empty file")
        return
    kind, fields = kind_of(path, corpus), FIELDS if corpus.field is None else (corpus.field,)
    if kind == "text":
        if corpus.where:
            raise ConfigError(f"{path}: is plain text, which has no fields for `where`. Leave `where` out.")
        yield from _read_text(path, corpus.documents, on_bad)
        return
    keep = _Where(corpus.where, Counter() if dropped is None else dropped)
    if kind == "arrow":
        yield from _read_arrow(path, fields, keep, on_bad, groups)
    else:
        yield from (_read_json_lines if kind == "jsonl" else _read_csv)(path, fields, keep, on_bad)


def kind_of(path: Path, corpus: CorpusConfig) -> str:
    """How a file is read: text, jsonl, csv or arrow."""
    unpacked = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return corpus.format if corpus.format != "auto" else SUFFIXES.get(unpacked.suffix, "text")


class _Where:
    """Whether a row has the values that are wanted; counts those that have not."""

    def __init__(self, wanted: Mapping[str, Plain | tuple[Plain, ...]], dropped: Counter[str]) -> None:
        lists = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
        self.texts = {name: set(map(str, values)) for name, values in lists.items()}  # CSV knows nothing but text
        self.dropped = dropped

    def __call__(self, row: Mapping[str, Any]) -> bool:
        for name, texts in self.texts.items():
            if str(row.get(name)) not in texts:
                self.dropped[f"where {name}"] += 1
                return False
        return True


def open_file(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {".gz": gzip.open, ".zst": zstd.open}
    return cast(IO[bytes], openers.get(path.suffix, open)(path, "rb"))


def _read_json_lines(path: Path, fields: Fields, keep: _Where, on_bad: OnBad) -> Iterator[str]:
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
                    if keep(record):
                        yield text
                else:
                    on_bad(f"{place}: has no text under {_named(fields)}")
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read past line {number} ({error}): truncated or not compressed as its name says")


def _named(fields: Fields) -> str:
    return " or ".join(map(repr, fields))


def _read_csv(path: Path, fields: Fields, keep: _Where, on_bad: OnBad) -> Iterator[str]:
    """The named column of comma- or (.tsv) tab-separated values with a line of names at the top."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    rows = None
    try:
        with open_file(path) as file, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            column = _column(fields, keep, rows.fieldnames or ())
            for row in rows:
                if row[column] is None:
                    on_bad(f"{path}:{rows.line_num}: has no text in column {column!r}")
                elif wrong := _not_utf8(row[column]):
                    on_bad(f"{path}:{rows.line_num}: {wrong}")
                elif keep(row):
                    yield row[column]
    except _NoColumnError as error:
        on_bad(f"{path}: {error}")
    except (*UNREADABLE, csv.Error) as error:
        on_bad(f"{path}: cannot be read past line {rows.line_num if rows else 0} ({error})")


class _NoColumnError(Exception):
    """A table does not have what is asked of it."""


def _column(fields: Fields, keep: _Where, names: Iterable[str]) -> str:
    """The first of the fields that a table has. Raises _NoColumnError when it has none, or none for `where`."""
    known = list(names)
    if missing := [name for name in keep.texts if name not in known]:
        raise _NoColumnError(f"has no column {_named(tuple(missing))} for `where`, only {', '.join(known)}")
    if (column := next((name for name in fields if name in known), None)) is None:
        raise _NoColumnError(f"has no column {_named(fields)}, only {', '.join(known)}")
    return column


def _arrow() -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError:
        raise ConfigError("Parquet and Arrow files need pyarrow; run: pip install 'franca[data]'") from None
    return pyarrow


def _read_arrow(path: Path, fields: Fields, keep: _Where, on_bad: OnBad, groups: Groups | None) -> Iterator[str]:
    """The named column of a Parquet file, or of an Arrow file or stream; no other column is read but those of `where`."""
    pyarrow, number = _arrow(), 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            if path.suffix == ".parquet":
                table = pyarrow.parquet.ParquetFile(file)
                column = _column(fields, keep, table.schema_arrow.names)
                some = range(table.num_row_groups)[slice(*groups) if groups else slice(None)]
                number = sum(table.metadata.row_group(group).num_rows for group in range(some.start))
                batches = table.iter_batches(1024, row_groups=some, columns=[column, *keep.texts])
            else:
                magic = file.read(6)
                file.seek(0)
                table = pyarrow.ipc.open_file(file) if magic == b"ARROW1" else pyarrow.ipc.open_stream(file)
                column = _column(fields, keep, table.schema.names)
                batches = (table.get_batch(i) for i in range(table.num_record_batches)) if magic == b"ARROW1" else table
            for batch in batches:
                texts = batch.column(column).to_pylist()
                rows = batch.select(list(keep.texts)).to_pylist() if keep.texts else repeat({}, len(texts))
                for place, (text, row) in enumerate(zip(texts, rows, strict=True), number + 1):
                    if not isinstance(text, str):
                        on_bad(f"{path}: row {place} has no text in column {column!r}")
                    elif keep(row):
                        yield text
                number += len(batch)
    except _NoColumnError as error:
        on_bad(f"{path}: {error}")
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        on_bad(f"{path}: cannot be read past row {number} ({error})")


def row_groups(path: Path) -> list[tuple[int, int]]:
    """The bytes [begin, end) of every row group of a Parquet file; none when it cannot be read."""
    pyarrow = _arrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            columns = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    except (OSError, pyarrow.ArrowException):
        return []  # whoever reads its documents will say why
    begins = [min(c.dictionary_page_offset or c.data_page_offset for c in group) for group in columns]
    return [(begin, begin + sum(c.total_compressed_size for c in g)) for begin, g in zip(begins, columns, strict=True)]


def _read_text(path: Path, documents: str, on_bad: OnBad) -> Iterator[str]:
    try:
        # Lines as editors count them, ends kept; `splitlines` would also cut at form feeds and at U+2028.
        with open_file(path) as file, io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="\n") as text:
            whole = [text.read()] if documents == "file" else []
            found = whole or (filter(str.strip, text) if documents == "line" else _paragraphs(text))
            for number, document in enumerate(found, 1):
                if wrong := _not_utf8(document):
                    on_bad(f"{path}: {'' if documents == 'file' else f'{documents} {number} '}{wrong}")
                else:
                    yield document
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read ({error})")


def _not_utf8(text: str) -> str | None:
    """What is wrong with a text that was read with `surrogateescape`, if anything is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            text.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            return f"is not UTF-8 text ({error.object[error.start :][:1]!r}: {error.reason})"
    return None


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

"""Documents out of files: plain text and JSON lines, plain or compressed (.gz, .zst).

What it refuses to know: tokens. A message names the file and line of what cannot be read.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

import orjson
from backports import zstd

from franca.core.config import config
from franca.core.errors import ConfigError

FIELDS = ("text", "content")
# What files and compressed streams raise for bytes that are not what they should be, an end in the middle among them.
UNREADABLE = (OSError, EOFError, zlib.error, zstd.ZstdError)


@config
class CorpusConfig:
    """One corpus. `paths` are globs (`**` for any depth); `documents` says where plain text is cut into documents."""

    paths: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    format: Literal["auto", "text", "jsonl"] = "auto"
    field: str | None = None  # of a JSON line; None: `text`, else `content`
    documents: Literal["file", "paragraph", "line"] = "file"


OnBad = Callable[[str], None]


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
    named_lines = corpus.format == "auto" and unpacked.suffix in (".jsonl", ".ndjson", ".json")
    if named_lines or corpus.format == "jsonl":
        yield from _read_json_lines(path, corpus.field, on_bad)
    else:
        yield from _read_text(path, corpus.documents, on_bad)


def _open(path: Path) -> IO[bytes]:
    openers: dict[str, Any] = {".gz": gzip.open, ".zst": zstd.open}
    return cast(IO[bytes], openers.get(path.suffix, open)(path, "rb"))


def _read_json_lines(path: Path, field: str | None, on_bad: OnBad) -> Iterator[str]:
    fields = FIELDS if field is None else (field,)
    number = 0
    try:
        with _open(path) as file:
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
                    on_bad(f"{place}: has no text under {' or '.join(map(repr, fields))}")
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read past line {number} ({error}): truncated or not compressed as its name says")


def _read_text(path: Path, documents: str, on_bad: OnBad) -> Iterator[str]:
    try:
        with _open(path) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        on_bad(f"{path}: is not UTF-8 text (byte {error.start})")
        return
    except UNREADABLE as error:
        on_bad(f"{path}: cannot be read ({error})")
        return
    lines = io.StringIO(text)  # as editors count them, ends kept; `splitlines` would also cut at form feeds and at U+2028
    if documents == "file":
        yield text
    elif documents == "line":
        yield from filter(str.strip, lines)
    else:
        yield from _paragraphs(lines)


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

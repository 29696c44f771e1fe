"""Text to a dataset folder: documents -> tokenizer -> `.bin/.idx` shards and a held-out set chosen by hash.

The work happens in `<output>.partial`, which is renamed when everything is there: a folder with the final name is whole.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from franca import __version__
from franca.core.config import config, load, to_dict
from franca.core.errors import ConfigError
from franca.core.progress import progress
from franca.core.run import sync_folder, write_atomically
from franca.data.indexed import ShardWriter, token_dtype
from franca.data.sources import CorpusConfig, Document, list_files, read_documents
from franca.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 4_000_000


@config
class TokenizerConfig:
    """`path` of a `tokenizer.json`, or, without it, the size of one to train on the training documents."""

    path: str | None = None
    vocab_size: int = 8192
    train_bytes: int = 200_000_000  # of text, at most, that a tokenizer is trained on


@config
class PrepareConfig:
    """`franca prepare`: named corpora into one dataset folder."""

    output: str
    sources: dict[str, CorpusConfig]
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_share: float = 0.01  # of the documents, held out by the hash of their text
    add_bos: bool = False
    add_eos: bool = True
    shard_tokens: int = 1_000_000_000
    on_bad_document: Literal["error", "skip"] = "error"


@dataclass
class Counts:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    shards: int = 0


@dataclass
class Tally:
    """What became of one corpus."""

    train: Counts = field(default_factory=Counts)
    validation: Counts = field(default_factory=Counts)
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)


def main(path: Path, words: list[str]) -> None:
    settings = load(PrepareConfig, path, words)
    output = prepare(settings)
    report(output)


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset folder of `settings`, or find it made already; returns its path.

    Raises:
        ConfigError: for bad settings, unreadable or bad documents (`on_bad_document: error`), or an output of other settings.
    """
    _check(settings)
    output = Path(settings.output).expanduser()
    files = {name: list_files(name, corpus) for name, corpus in settings.sources.items()}
    key = _key(settings, files)
    if output.exists():
        if _prepared_key(output) == key:
            print(f"{output} is already prepared from the same files and settings", file=sys.stderr)
            return output
        raise ConfigError(
            f"{output}: exists and was not made from these files and settings. Remove it or choose another output."
        )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    work = _Work(settings, files)
    tokenizer = work.tokenizer()
    (partial / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    tallies = work.write_shards(tokenizer, partial)
    manifest = {
        "format": 1,
        "franca": __version__,
        "key": key,
        "settings": to_dict(settings),
        "tokenizer": {
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos if settings.add_bos else None,
            "eos": tokenizer.eos if settings.add_eos else None,
        },
        "sources": {
            name: {"train": vars(tally.train), "validation": vars(tally.validation), "skipped": tally.skipped}
            | ({"first_skipped": tally.first_skipped} if tally.skipped else {})
            for name, tally in tallies.items()
        },
    }
    write_atomically(partial / "manifest.json", json.dumps(manifest, indent=2))
    partial.rename(output)
    sync_folder(output.parent)
    return output


def _check(settings: PrepareConfig) -> None:
    if not settings.sources:
        raise ConfigError("sources: is empty; name at least one corpus: sources: {mine: {paths: [...]}}")
    for name in settings.sources:
        if not name or not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
            raise ConfigError(f"sources: {name!r} cannot be a folder's name; use letters, digits, '.', '_' and '-'")
    if not 0 <= settings.validation_share < 1:
        raise ConfigError(f"validation_share: is {settings.validation_share:g}; it must be at least 0 and below 1")
    if settings.tokenizer.path is None and settings.tokenizer.vocab_size < 257:
        raise ConfigError(f"tokenizer.vocab_size: is {settings.tokenizer.vocab_size}; 256 bytes and one special token need 257")
    if settings.tokenizer.path is None and settings.tokenizer.train_bytes < 1:
        raise ConfigError(f"tokenizer.train_bytes: is {settings.tokenizer.train_bytes}; it must be at least 1")
    if settings.shard_tokens < 1:
        raise ConfigError(f"shard_tokens: is {settings.shard_tokens}; it must be at least 1")


def _key(settings: PrepareConfig, files: dict[str, list[Path]]) -> str:
    """A hash of the settings and of every file's path, size and time of change."""
    stats = {
        name: [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths] for name, paths in files.items()
    }
    settings_only = {name: value for name, value in to_dict(settings).items() if name != "output"}
    return hashlib.sha256(json.dumps([__version__, settings_only, stats], sort_keys=True).encode()).hexdigest()


def _prepared_key(output: Path) -> str | None:
    try:
        return str(json.loads((output / "manifest.json").read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass
class _Work:
    settings: PrepareConfig
    files: dict[str, list[Path]]

    def tokenizer(self) -> Tokenizer:
        wanted = self.settings.tokenizer
        if wanted.path is not None:
            return Tokenizer.load(Path(wanted.path).expanduser())
        texts = self._training_texts(wanted.train_bytes)
        first = next(texts, None)
        if first is None:
            raise ConfigError("tokenizer: there is no training text to learn it from. Add documents or lower validation_share")
        return Tokenizer.train(chain([first], texts), wanted.vocab_size)

    def _training_texts(self, limit_bytes: int) -> Iterator[str]:
        used, total = 0, sum(path.stat().st_size for paths in self.files.values() for path in paths)
        with progress("tokenizer: reading", min(total, limit_bytes)) as show:
            for name, paths in self.files.items():
                for path in paths:
                    for document in read_documents(path, self.settings.sources[name], self._refuse_or(lambda reason: None)):
                        if is_held_out(document.text, self.settings.validation_share):
                            continue
                        text = document.text.encode()
                        if len(text) >= limit_bytes - used:  # one book may be longer than the limit: learn from its beginning
                            yield text[: limit_bytes - used].decode(errors="ignore")
                            return
                        used += len(text)
                        yield document.text
                    show(min(used, total))

    def _refuse_or(self, skip: Any) -> Any:
        def on_bad(reason: str) -> None:
            if self.settings.on_bad_document == "error":
                raise ConfigError(
                    f"{reason}. Mend it, or set on_bad_document: skip to leave such documents out and count them."
                )
            skip(reason)

        return on_bad

    def write_shards(self, tokenizer: Tokenizer, root: Path) -> dict[str, Tally]:
        tallies = {name: Tally() for name in self.files}
        total = sum(path.stat().st_size for paths in self.files.values() for path in paths)
        done = 0
        with progress("tokens", total) as show:
            for name, paths in self.files.items():
                corpus = _CorpusWriter(root, name, self.settings, tokenizer, tallies[name])
                try:
                    for path in paths:
                        for document in read_documents(path, self.settings.sources[name], self._refuse_or(corpus.skip)):
                            corpus.add(document)
                        done += path.stat().st_size
                        show(done, f"{sum(t.train.tokens + t.validation.tokens for t in tallies.values()):,} tokens")
                    corpus.close()
                finally:
                    corpus.abandon()
                if not tallies[name].train.tokens:
                    raise ConfigError(
                        f"sources.{name}: no training tokens came out of {len(paths)} file(s), "
                        f"{tallies[name].validation.documents} document(s) were held out. Add documents, lower "
                        "validation_share, or cut the text with documents: paragraph"
                    )
        return tallies


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out set: a property of its text alone, the same in every run."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


class _CorpusWriter:
    """Batches documents through the tokenizer into the two splits of one corpus."""

    def __init__(self, root: Path, name: str, settings: PrepareConfig, tokenizer: Tokenizer, tally: Tally) -> None:
        self.root, self.name, self.settings, self.tokenizer, self.tally = root, name, settings, tokenizer, tally
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.pending: list[str] = []
        self.characters = 0
        self.writers: dict[str, ShardWriter] = {}

    def skip(self, reason: str) -> None:
        self.tally.skipped += 1
        if len(self.tally.first_skipped) < 10:
            self.tally.first_skipped.append(reason)

    def add(self, document: Document) -> None:
        self.pending.append(document.text)
        self.characters += len(document.text)
        if self.characters >= BATCH_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        encoded = self.tokenizer.encode(self.pending, self.settings.add_bos, self.settings.add_eos)
        for text, ids in zip(self.pending, encoded, strict=True):
            split = "validation" if is_held_out(text, self.settings.validation_share) else "train"
            counts: Counts = getattr(self.tally, split)
            writer = self.writers.get(split)
            if writer is None or writer.num_tokens >= self.settings.shard_tokens:
                if writer is not None:
                    writer.commit()
                writer = ShardWriter(self.root / split / self.name / f"{counts.shards:05d}", self.dtype)
                self.writers[split] = writer
                counts.shards += 1
            writer.add([ids])
            counts.documents += 1
            counts.tokens += len(ids)
            counts.bytes += len(text.encode("utf-8", "surrogatepass"))
        self.pending, self.characters = [], 0

    def close(self) -> None:
        self._flush()
        for writer in self.writers.values():
            writer.commit()

    def abandon(self) -> None:
        """Close what a failure left open; what was committed stays."""
        for writer in self.writers.values():
            writer.abandon()


def report(output: Path) -> None:
    """Print what a dataset folder holds."""
    manifest = json.loads((output / "manifest.json").read_text())
    print(f"{output}: tokenizer of {manifest['tokenizer']['vocab_size']:,} tokens")
    for name, entry in manifest["sources"].items():
        for split in ("train", "validation"):
            c = entry[split]
            ratio = f", {c['bytes'] / c['tokens']:.2f} bytes per token" if c["tokens"] else ""
            print(f"  {name} {split}: {c['documents']:,} documents, {c['tokens']:,} tokens in {c['shards']} shard(s){ratio}")
        if entry["skipped"]:
            print(f"  {name}: {entry['skipped']:,} bad document(s) skipped, the first: {entry['first_skipped'][0]}")

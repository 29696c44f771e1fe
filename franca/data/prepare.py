"""Text to a dataset folder: documents -> tokenizer -> `.bin/.idx` shards and a held-out set chosen by hash.

The work happens in `<output>.partial`, which is renamed when everything is there: a folder with the final name is whole.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from franca import __version__
from franca.core.config import Count, config, load, to_dict
from franca.core.errors import ConfigError
from franca.core.progress import progress
from franca.core.run import sync_folder, write_atomically
from franca.data.indexed import Dataset, ShardWriter, token_dtype
from franca.data.sources import CorpusConfig, list_files, read_documents
from franca.data.tokenizer import Tokenizer

Files = dict[str, list[Path]]  # of every source

BATCH_CHARACTERS = 4_000_000


@config
class TokenizerConfig:
    """`path` of a `tokenizer.json`, or, without it, the size of one to train on the training documents."""

    path: str | None = None
    vocab_size: Annotated[int, Field(ge=257)] = 8192  # 256 bytes and one special token
    train_bytes: Count = 200_000_000  # of text, at most, that a tokenizer is trained on


@config
class PrepareConfig:
    """`franca prepare`: named corpora into one dataset folder."""

    output: str
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], CorpusConfig], Field(min_length=1)]  # by folder name
    tokenizer: TokenizerConfig = TokenizerConfig()
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.01  # of the documents, held out by the hash of their text
    add_bos: bool = False
    add_eos: bool = True
    shard_tokens: Count = 1_000_000_000
    on_bad_document: Literal["error", "skip"] = "error"


def main(path: Path, words: list[str]) -> None:
    """The command: prepare, and report."""
    report(prepare(load(PrepareConfig, path, words)))


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset folder of `settings`, or find it made; returns its path. Raises ConfigError for what cannot be read."""
    output = Path(settings.output).expanduser()
    files = {name: list_files(name, corpus) for name, corpus in settings.sources.items()}
    key = _key(settings, files)
    if output.exists():
        with suppress(ConfigError):  # a folder that is no dataset
            if Dataset(output).manifest.get("key") == key:
                print(f"{output} is already prepared from the same files and settings", file=sys.stderr)
                return output
        advice = "Remove it or choose another output."
        raise ConfigError(f"{output}: exists and was not made from these files and settings. {advice}")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = _tokenizer(settings, files)
    (partial / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    sources = _write_shards(settings, files, tokenizer, partial)
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
        "sources": sources,
    }
    write_atomically(partial / "manifest.json", json.dumps(manifest, indent=2))
    partial.rename(output)
    sync_folder(output.parent)
    return output


def _key(settings: PrepareConfig, files: Files) -> str:
    """A hash of the settings and of every file's path, size and time of change."""
    stats = [(name, str(path), path.stat()) for name, paths in files.items() for path in paths]
    facts = [[name, path, stat.st_size, stat.st_mtime_ns] for name, path, stat in stats]
    inputs = [__version__, to_dict(settings) | {"output": None}, facts]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _read(title: str, settings: PrepareConfig, files: Files, skip: Callable[[str, str], None]) -> Iterator[tuple[str, str]]:
    """The (source, text) of every document. A bad one is refused, or its reason goes to `skip(source, reason)`."""

    def on_bad(reason: str) -> None:
        if settings.on_bad_document == "error":
            advice = "Mend it, or set on_bad_document: skip to leave such documents out and count them."
            raise ConfigError(f"{reason}. {advice}")
        skip(name, reason)

    done = documents = 0
    with progress(title, sum(path.stat().st_size for paths in files.values() for path in paths)) as show:
        for name, paths in files.items():
            for path in paths:
                for text in read_documents(path, settings.sources[name], on_bad):
                    documents += 1
                    yield name, text
                done += path.stat().st_size
                show(done, f"{documents:,} documents")


def _tokenizer(settings: PrepareConfig, files: Files) -> Tokenizer:
    wanted = settings.tokenizer
    if wanted.path is not None:
        return Tokenizer.load(Path(wanted.path).expanduser())
    texts = _training_texts(settings, files)
    first = next(texts, None)
    if first is None:
        raise ConfigError("tokenizer: there is no training text to learn it from. Add documents or lower validation_share")
    return Tokenizer.train(chain([first], texts), wanted.vocab_size)


def _training_texts(settings: PrepareConfig, files: Files) -> Iterator[str]:
    """Training documents up to `train_bytes`; the last is cut: one book may be longer than the limit."""
    left = settings.tokenizer.train_bytes
    for _, text in _read("tokenizer: reading", settings, files, skip=lambda name, reason: None):
        if not is_held_out(text, settings.validation_share):
            content = text.encode()[:left]
            yield content.decode(errors="ignore")
            left -= len(content)
            if not left:
                return


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out set: a property of its text alone, the same in every run."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


class _Split:
    """The training or the held-out half of a source: shard after shard, and `facts`, its entry of the manifest."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.writer: ShardWriter | None = None
        self.facts: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0, "sha256": []}

    def add(self, text: str, ids: NDArray[Any]) -> None:
        if self.writer is None:
            self.writer = ShardWriter(self.folder / f"{self.facts['shards']:05d}", self.dtype)
        self.writer.add([ids])
        for name, count in (("documents", 1), ("tokens", len(ids)), ("bytes", len(text.encode()))):
            self.facts[name] += count
        if self.writer.num_tokens >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """End the shard that is being written, if there is one."""
        if self.writer is not None:
            self.facts["sha256"].append(self.writer.commit())
            self.facts["shards"] += 1
            self.writer = None


def _write_shards(settings: PrepareConfig, files: Files, tokenizer: Tokenizer, root: Path) -> dict[str, dict[str, Any]]:
    """Every document into a shard under `root`; returns what each source has become, for the manifest."""
    entries: dict[str, dict[str, Any]] = {name: {"skipped": 0, "first_skipped": []} for name in files}
    dtype = token_dtype(tokenizer.vocab_size)

    def skip(name: str, reason: str) -> None:
        entries[name]["skipped"] += 1
        entries[name]["first_skipped"] = [*entries[name]["first_skipped"], reason][:10]

    places = [(name, split) for name in files for split in ("train", "validation")]
    splits = {(name, split): _Split(root / split / name, dtype, settings.shard_tokens) for name, split in places}
    try:
        for batch in _batches(_read("tokens", settings, files, skip)):
            encoded = tokenizer.encode([text for _, text in batch], settings.add_bos, settings.add_eos)
            for (name, text), ids in zip(batch, encoded, strict=True):
                splits[name, "validation" if is_held_out(text, settings.validation_share) else "train"].add(text, ids)
    finally:
        for (name, split), written in splits.items():
            written.close()
            entries[name][split] = written.facts
    for name, entry in entries.items():
        if not entry["train"]["tokens"]:
            found = f"{len(files[name])} file(s), {entry['validation']['documents']} document(s) were held out"
            advice = "Add documents, lower validation_share, or cut the text with documents: paragraph"
            raise ConfigError(f"sources.{name}: no training tokens came out of {found}. {advice}")
    return entries


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists of documents, of about BATCH_CHARACTERS each: the tokenizer works on many at once."""
    batch, characters = list[tuple[str, str]](), 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def report(output: Path) -> None:
    """Print what a dataset folder holds."""
    manifest = Dataset(output).manifest
    print(f"{output}: tokenizer of {manifest['tokenizer']['vocab_size']:,} tokens")
    for name, entry in manifest["sources"].items():
        for split in ("train", "validation"):
            c = entry[split]
            ratio = f", {c['bytes'] / c['tokens']:.2f} bytes per token" if c["tokens"] else ""
            print(f"  {name} {split}: {c['documents']:,} documents, {c['tokens']:,} tokens in {c['shards']} shard(s){ratio}")
        if entry["skipped"]:
            print(f"  {name}: {entry['skipped']:,} bad document(s) skipped, the first: {entry['first_skipped'][0]}")

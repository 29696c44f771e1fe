"""`franca prepare`: text to a dataset folder. Documents -> tokenizer -> `.bin/.idx` shards and a held-out set chosen by hash.

The work is a list of units (see `tokenize`), each committed by itself: killed anywhere and started again, it does what is
missing, and the bytes are the same. A folder is a dataset from the moment its manifest is written.
"""

import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from franca import __version__
from franca.core.config import Count, config, load, to_dict
from franca.core.errors import ConfigError, disk_errors
from franca.core.progress import progress
from franca.core.run import lock, write_atomically
from franca.core.workers import wait_for_workers
from franca.data import executor, tokenize, tokenizer_formats
from franca.data.executor import ExecutorConfig, LocalExecutor, Work
from franca.data.indexed import Dataset
from franca.data.sources import CorpusConfig, kind_of, list_files, row_groups
from franca.data.tokenize import SPLITS, Policy, Unit, is_held_out
from franca.data.tokenizer import Tokenizer
from franca.data.tokenizer_formats import named, open_tokenizer

UNIT_BYTES = 64_000_000  # files smaller than this are prepared together
KILLED_S = 5.0  # that a preparation may take to go when it was just killed

Files = dict[str, list[Path]]  # of every source


@config
class TokenizerConfig:
    """A tokenizer by its path (tokenizer.json, SentencePiece model, tiktoken file) or its name; or the size of one to train."""

    path: str | None = None
    name: str | None = None  # bytes, gpt2, llama2, llama3, gemma, or one of tiktoken's
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
    workers: Count = 1  # units at once
    executor: ExecutorConfig = LocalExecutor()
    download_dir: str | None = None  # for the files of the hub; None: beside the output


def main(path: Path, words: list[str]) -> None:
    """The command: prepare, and report."""
    report(prepare(load(PrepareConfig, path, words)))


def prepare(settings: PrepareConfig) -> Path:
    """Make the dataset folder of `settings`, or finish it; returns its path.

    Raises ConfigError for what cannot be read or written; after any end it goes on where it was.
    """
    root = Path(settings.output).expanduser()
    with disk_errors(root):
        _prepare(settings, root)
    return root


def _prepare(settings: PrepareConfig, root: Path) -> None:
    if settings.download_dir is not None and all(corpus.hub is None for corpus in settings.sources.values()):
        raise ConfigError("download_dir: was given, but no source is of the hub (hub: owner/name). Leave it out")
    corpora = {name: _local(corpus, settings) for name, corpus in settings.sources.items()}
    files = {name: list_files(name, corpus) for name, corpus in corpora.items()}
    if root.exists() and not (root.is_dir() and _is_ours(root)):
        raise ConfigError(f"{root}: exists and is no dataset of franca. Remove it, or choose another output.")
    (root / "units").mkdir(parents=True, exist_ok=True)
    advice = "Wait for it, or choose another output."
    with lock(root / "units" / ".lock", f"{root}: another process is preparing it. {advice}", KILLED_S):
        wait_for_workers(root / "units")
        tokenizer = _tokenizer(settings, files, root)
        policy = Policy(
            tokenizer.fingerprint,
            settings.add_bos,
            settings.add_eos,
            settings.validation_share,
            settings.shard_tokens,
            settings.on_bad_document == "skip",
        )
        tokenizer.encode_flat([], settings.add_bos, settings.add_eos)  # refuses what it has no token for
        units = [unit for name, paths in files.items() for unit in _units(name, corpora[name], paths)]
        units = [unit for name in files for unit in _marked(root, [u for u in units if u.source == name], policy, settings)]
        records = _finish(root, units, policy, settings)
        manifest = _manifest(settings, tokenizer, files, [(u.source, record) for u, record in zip(units, records, strict=True)])
        write_atomically(root / "manifest.json", json.dumps(manifest, indent=2))
        _sweep(root, manifest, units, policy)


def _is_ours(root: Path) -> bool:
    """Whether all in a folder may be swept: its lock is there, or nothing at all but `units`, just made."""
    return (root / "units" / ".lock").is_file() or all(p == root / "units" and p.is_dir() for p in root.rglob("*"))


def _local(corpus: CorpusConfig, settings: PrepareConfig) -> CorpusConfig:
    """The corpus with its files on this machine: those of the hub are downloaded first, as far as they are not there."""
    if corpus.hub is None:
        if corpus.revision != "main":
            given = f"revision {corpus.revision!r} was given without `hub`"
            raise ConfigError(f"sources: {given}; name the dataset (hub: owner/name), or leave it out")
        return corpus
    from franca.data.hub import bring  # a client that others need not load

    folder = Path(settings.download_dir or f"{settings.output}.download").expanduser() / corpus.hub
    exclude = tuple(f"{folder}/{pattern}" for pattern in corpus.exclude)
    return replace(corpus, paths=bring(corpus.hub, folder, corpus.paths, corpus.revision), exclude=exclude)


def _units(name: str, corpus: CorpusConfig, paths: list[Path]) -> Iterator[Unit]:
    """Neighbouring small files together, large files alone, in the order of the files; large Parquet files in parts."""
    together, size = list[Path](), 0
    for path in paths:
        here = path.stat().st_size
        if together and size + here > UNIT_BYTES:
            yield Unit(name, corpus, tuple(together), size)
            together, size = [], 0
        is_large_parquet = here > UNIT_BYTES and path.suffix == ".parquet" and kind_of(path, corpus) == "arrow"
        if groups := row_groups(path) if is_large_parquet else []:
            yield from _parts(name, corpus, path, groups)
        else:
            together.append(path)
            size += here
    if together:
        yield Unit(name, corpus, tuple(together), size)


def _parts(name: str, corpus: CorpusConfig, path: Path, groups: list[tuple[int, int]]) -> Iterator[Unit]:
    """A Parquet file cut between row groups, which are bytes [begin, end) of it."""
    first = 0
    for last, (_, end) in enumerate(groups, 1):
        begin = groups[first][0]
        if end - begin > UNIT_BYTES or last == len(groups):
            yield Unit(name, corpus, (path,), end - begin, (first, last), (begin, end))
            first = last


def _marked(root: Path, units: list[Unit], policy: Policy, settings: PrepareConfig) -> list[Unit]:
    """The units of a source, with the copies among their documents marked if they are to be left out."""
    kind = units[0].corpus.deduplicate
    if kind is None:
        return units
    from franca.data.deduplicate import duplicates  # which others need not load

    facts = [[unit.id(policy), _facts({unit.source: list(unit.files)})] for unit in units]
    folder = root / "units" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.copies"
    found = duplicates(kind, [partial(_kept, unit, policy.skip_bad) for unit in units], folder, settings.workers)
    marked = []
    for number, (unit, places) in enumerate(zip(units, found, strict=True)):
        path, content = folder / f"{number}.npy", io.BytesIO()
        np.save(content, places, allow_pickle=False)
        write_atomically(path, content.getvalue())
        marked.append(replace(unit, copies=(path, hashlib.sha256(content.getvalue()).hexdigest())))
    return marked


def _kept(unit: Unit, skip_bad: bool) -> Iterator[str]:
    """The documents of a unit behind its filters; bad ones are reported when the unit is prepared, if they may be skipped."""
    return tokenize.documents(
        unit, (lambda reason: None) if skip_bad else tokenize.refuse, Counter(), tokenize.filters_of(unit.corpus)
    )


def _finish(root: Path, units: list[Unit], policy: Policy, settings: PrepareConfig) -> list[dict[str, Any]]:
    """The records of all units, in order; what is missing is done, the largest first."""
    records = {number: record for number, u in enumerate(units) if (record := tokenize.committed(root, u, policy))}
    missing = sorted(set(range(len(units))) - set(records), key=lambda number: (-units[number].num_bytes, number))
    if not missing:
        print(f"{root} is already prepared from the same files and settings", file=sys.stderr)
        return [records[number] for number in range(len(units))]
    (root / "manifest.json").unlink(missing_ok=True)
    if records:
        print(f"{len(records)} of {len(units)} units are there already", file=sys.stderr)
    total, done, tokens = sum(units[number].num_bytes for number in missing), 0, 0
    in_done = 0  # tokens of the units that are done
    with progress("tokens", total) as show:

        def tick(new: int) -> None:
            nonlocal tokens
            tokens += new
            under_way = (tokens - in_done) * (done / in_done if in_done else 4.0)  # bytes, about
            show(min(done + int(under_way), total - 1), f"{tokens:,} tokens")

        for number, record in executor.run(Work(root, units, missing, policy, settings.workers, tick), settings.executor):
            records[number] = record
            done, in_done = done + units[number].num_bytes, in_done + sum(record[split]["tokens"] for split in SPLITS)
            tick(0)
        show(total, f"{tokens:,} tokens")
    return [records[number] for number in range(len(units))]


def _tokenizer(settings: PrepareConfig, files: Files, root: Path) -> Tokenizer:
    """The tokenizer that is given, or one trained on the documents; the same again when the command is run again."""
    wanted, path = settings.tokenizer, root / "tokenizer.json"
    if wanted.path and wanted.name:
        raise ConfigError(f"tokenizer: give a path ({wanted.path}) or a name ({wanted.name}), not both")
    trained = wanted.path is None and wanted.name is None
    made_from = json.dumps([to_dict(wanted), settings.validation_share, _facts(files) if trained else None])
    if path.exists() and (root / "units" / "tokenizer").read_text() == made_from and wanted.path is None:
        return Tokenizer.load(path)
    if wanted.path:
        tokenizer = open_tokenizer(Path(wanted.path).expanduser())
    else:
        tokenizer = named(wanted.name) if wanted.name else _train(settings, files)
    same = path.exists() and path.read_text(encoding="utf-8") == tokenizer.json
    if not same:  # from here on until the end there is no dataset
        (root / "manifest.json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    write_atomically(root / "units" / "tokenizer", made_from)
    if not same:
        write_atomically(path, tokenizer.json)
    return tokenizer


def _facts(files: Files) -> list[Any]:
    return [[name, str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, paths in files.items() for path in paths]


def make_tokenizer(words: list[str]) -> None:
    """The command `franca prepare tokenizer`."""
    tokenizer_formats.main(words, _train_by)


def _train_by(path: Path, words: list[str]) -> Tokenizer:
    """The tokenizer that a preparation of these settings would train."""
    settings = load(PrepareConfig, path, words)
    if settings.tokenizer.path or settings.tokenizer.name:
        raise ConfigError(f"{path}: names a tokenizer (path or name); leave it out to train one, or name it in place of {path}")
    corpora = {name: _local(corpus, settings) for name, corpus in settings.sources.items()}
    return _train(settings, {name: list_files(name, corpus) for name, corpus in corpora.items()})


def _train(settings: PrepareConfig, files: Files) -> Tokenizer:
    texts = _training_texts(settings, files)
    first = next(texts, None)
    if first is None:
        raise ConfigError("tokenizer: there is no training text to learn it from. Add documents or lower validation_share")
    return Tokenizer.train(chain([first], texts), settings.tokenizer.vocab_size)


def _training_texts(settings: PrepareConfig, files: Files) -> Iterator[str]:
    """Training documents up to `train_bytes`; the last is cut: one book may be longer than the limit."""

    left = total = min(settings.tokenizer.train_bytes, sum(path.stat().st_size for paths in files.values() for path in paths))
    with progress("tokenizer: reading", total) as show:
        for name, paths in files.items():
            for text in _kept(Unit(name, settings.sources[name], tuple(paths), 0), settings.on_bad_document == "skip"):
                if not is_held_out(text, settings.validation_share):
                    content = text.encode()[:left]
                    yield content.decode(errors="ignore")
                    left -= len(content)
                    show(total - left)
                    if not left:
                        return


def _manifest(
    settings: PrepareConfig, tokenizer: Tokenizer, files: Files, records: list[tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    sources = {name: tokenize.gather([record for source, record in records if source == name]) for name in files}
    for name, entry in sources.items():
        if not entry["train"]["tokens"]:
            found = f"{len(files[name])} file(s), {entry['validation']['documents']} document(s) were held out"
            advice = "Add documents, lower validation_share, or cut the text with documents: paragraph"
            raise ConfigError(f"sources.{name}: no training tokens came out of {found}. {advice}")
    return {
        "format": 2,
        "franca": __version__,
        "settings": {key: value for key, value in to_dict(settings).items() if key != "executor"},  # how, and not what
        "tokenizer": {
            "sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos": tokenizer.bos if settings.add_bos else None,
            "eos": tokenizer.eos if settings.add_eos else None,
        },
        "sources": sources,
    }


def _sweep(root: Path, manifest: dict[str, Any], units: list[Unit], policy: Policy) -> None:
    """Remove what an earlier state of the sources, or a killed attempt, left behind."""
    kept = {root / "units" / f"{unit.id(policy)}.json" for unit in units}
    kept |= {root / "units" / name for name in (".lock", "tokenizer")}
    for path in {unit.copies[0] for unit in units if unit.copies}:
        kept |= {path, path.with_name("exact.npz"), path.with_name("minhash.npz")}
    for name, entry in manifest["sources"].items():
        for split in SPLITS:
            places = [root / split / name / shard["name"] for shard in entry[split]["shards"]]
            kept |= {Path(f"{place}.{kind}") for place in places for kind in ("bin", "idx")}
    for folder in ("units", *SPLITS):
        for path in sorted((root / folder).rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()
    for path in root.glob(".*.partial"):
        path.unlink()


def report(output: Path) -> None:
    """Print what a dataset folder holds."""
    manifest = Dataset(output).manifest
    print(f"{output}: tokenizer of {manifest['tokenizer']['vocab_size']:,} tokens")
    for name, entry in manifest["sources"].items():
        for split in SPLITS:
            c = entry[split]
            ratio = f", {c['bytes'] / c['tokens']:.2f} bytes per token" if c["tokens"] else ""
            counts = f"{c['documents']:,} documents, {c['tokens']:,} tokens in {len(c['shards'])} shard(s)"
            print(f"  {name} {split}: {counts}{ratio}")
        for reason, count in entry["dropped"].items():
            print(f"  {name}: {count:,} document(s) left out by {reason}")
        if entry["skipped"]:
            print(f"  {name}: {entry['skipped']:,} bad document(s) skipped, the first: {entry['first_skipped'][0]}")
        _describe(Dataset(output), name, entry["train"])


def _describe(dataset: Dataset, name: str, facts: dict[str, Any]) -> None:
    """Lengths, what looks like garbage, and some documents as they will be seen in training."""
    most = max(facts["lengths"])
    for power, count in enumerate(facts["lengths"]):
        if count:
            print(f"    {f'< {2**power:,} tokens':>18} {count:12,} {'#' * -(-40 * count // most)}")
    examined, lines = facts["examined"], max(1, facts["lines"])
    if facts["repeated_lines"] > 0.2 * lines:
        share = f"{facts['repeated_lines'] / lines:.0%}"
        print(f"    warning: {share} of the lines of {examined} documents repeat an earlier line of their document")
    if facts["one_character"]:
        print(f"    warning: {facts['one_character']} of {examined} documents are mostly one character")
    tokenizer, shards = Tokenizer.load(dataset.root / "tokenizer.json"), dataset.shards("train", name)
    for number in np.linspace(0, sum(shard.num_tokens for shard in shards), 10, endpoint=False).astype(int).tolist():
        for shard in shards:
            if number < shard.num_tokens:
                print(f"    | {json.dumps(tokenizer.decode(shard.read(number, 24).tolist()), ensure_ascii=False)}")
                break
            number -= shard.num_tokens

"""`franca prepare mix`: prepared folders and weights into one folder that holds the mixture, without repeating a document.

Whole shards are linked (copied, where links cannot be made); only the shard at which a source's share ends is cut, after a
document. Which shards are taken is drawn by the seed.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from franca import __version__
from franca.core.config import Count, Positive, config, load, to_dict
from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically
from franca.data.indexed import Dataset, Shard, ShardWriter
from franca.data.order import permute


@config
class PartConfig:
    """One prepared dataset folder, and its share of the mixture's tokens."""

    path: str
    weight: Positive


@config
class MixConfig:
    """`franca prepare mix`. `tokens`: how many the mixture shall have; None: as many as there are without repetition."""

    output: str
    sources: Annotated[dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], PartConfig], Field(min_length=1)]  # by new name
    tokens: Count | None = None
    seed: Annotated[int, Field(ge=0)] = 0


def main(path: Path, words: list[str]) -> None:
    """The command: mix, and print what was asked and what was reached."""
    output = mix(load(MixConfig, path, words))
    statistics = json.loads((output / "manifest.json").read_text())["mixture"]
    print(f"{output}: {sum(entry['tokens'] for entry in statistics.values()):,} tokens")
    for name, entry in statistics.items():
        shares = f"{entry['asked']:.4%} asked, {entry['reached']:.4%} reached"
        print(f"  {name:20} {entry['tokens']:16,} of {entry['available']:,} tokens, {entry['files']} files, {shares}")


def mix(settings: MixConfig) -> Path:
    """Make the folder of `settings`; returns its path. Raises ConfigError when it cannot be made without repetition."""
    output = Path(settings.output).expanduser()
    if output.exists():
        raise ConfigError(f"{output}: exists already. Remove it, or choose another output.")
    datasets = {name: Dataset(Path(part.path).expanduser()) for name, part in settings.sources.items()}
    first = next(iter(datasets.values()))
    for dataset in datasets.values():
        if dataset.manifest["tokenizer"] != first.manifest["tokenizer"]:
            raise ConfigError(f"sources: {dataset.root} and {first.root} were made with different tokenizers or BOS and EOS")
    shards = {name: _shards(dataset, "train") for name, dataset in datasets.items()}
    available = {name: sum(shard.num_tokens for shard, _ in group) for name, group in shards.items()}
    whole = sum(part.weight for part in settings.sources.values())
    shares = {name: part.weight / whole for name, part in settings.sources.items()}
    scarce = min(available, key=lambda name: available[name] / shares[name])
    most = int(available[scarce] / shares[scarce])
    if (settings.tokens or 1) > most:
        lack = f"{settings.tokens:,} tokens cannot be had without repetition; {scarce} ends at {most:,}"
        raise ConfigError(f"tokens: {lack}. Lower tokens or the weight of {scarce}, or add data.")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries: dict[str, Any] = {}
    for number, (name, group) in enumerate(shards.items()):
        wanted = round(shares[name] * (settings.tokens or most))
        order = permute(np.arange(len(group)), len(group), np.uint64(settings.seed * 1_000_003 + number))
        train = _take(partial / "train" / name, [group[place] for place in order], wanted)
        held_out = _take(partial / "validation" / name, _shards(datasets[name], "validation"))
        held_out["bytes"] = sum(splits["validation"]["bytes"] for splits in datasets[name].manifest["sources"].values())
        entries[name] = {"skipped": 0, "first_skipped": [], "dropped": {}, "train": train, "validation": held_out}
    taken = {name: entry["train"]["tokens"] for name, entry in entries.items()}
    statistics = {
        name: {
            "asked": shares[name],
            "reached": count / max(1, sum(taken.values())),
            "tokens": count,
            "available": available[name],
            "files": len(entries[name]["train"]["shards"]),
        }
        for name, count in taken.items()
    }
    facts = {"format": 2, "franca": __version__, "settings": to_dict(settings), "mixture": statistics}
    manifest = {**facts, "tokenizer": first.manifest["tokenizer"], "sources": entries}
    shutil.copyfile(first.root / "tokenizer.json", partial / "tokenizer.json")
    write_atomically(partial / "manifest.json", json.dumps(manifest, indent=2))
    partial.rename(output)
    sync_folder(output.parent)
    return output


def _shards(dataset: Dataset, split: str) -> list[tuple[Shard, str]]:
    """All shards of a dataset, with their checksums."""
    sources = dataset.manifest["sources"]
    said = [entry["sha256"] for splits in sources.values() for entry in splits[split]["shards"]]
    return list(zip((shard for name in sources for shard in dataset.shards(split, name)), said, strict=True))


def _take(folder: Path, shards: list[tuple[Shard, str]], wanted: float = math.inf) -> dict[str, Any]:
    """Documents of about `wanted` tokens from the front of `shards`, as the entry of a manifest."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    for shard, said in shards:
        left = wanted - facts["tokens"]
        if left <= 0:
            break
        name, count, tokens = f"{len(facts['shards']):05d}", shard.num_documents, shard.num_tokens
        if tokens <= left:
            _link(shard.bin_path, folder / f"{name}.bin")
            _link(shard.idx_path, folder / f"{name}.idx")
        else:
            ends = shard.document_lengths.astype(np.int64).cumsum()
            count = int(np.abs(ends - left).argmin()) + 1  # to the nearest end of a document
            tokens = int(ends[count - 1])
            writer = ShardWriter(folder / name, shard.dtype)
            writer.add(shard.read(0, tokens), shard.document_lengths[:count])
            said = writer.commit()
        facts["shards"].append({"name": name, "tokens": tokens, "sha256": said})
        facts["documents"], facts["tokens"] = facts["documents"] + count, facts["tokens"] + tokens
        if shard.num_tokens > left:
            break
    return facts


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)

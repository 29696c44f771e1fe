"""`franca verify` for a prepared dataset: every byte read, everything that the manifest says looked at."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from franca.core.errors import ConfigError
from franca.core.progress import progress
from franca.data.indexed import Dataset, Shard
from franca.data.order import Order, Source
from franca.data.tokenizer import Tokenizer

CHUNK_TOKENS = 8_000_000


def main(path: Path, as_json: bool) -> int:
    """Print what is wrong. Returns 0, or 1 when something is."""
    found = verify(path)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        counts = f"{found['shards']} shard(s), {found['documents']:,} documents, {found['tokens']:,} tokens"
        lines = [f"  - {problem}" for problem in found["problems"]] or ["  all as the manifest says"]
        print("\n".join([f"{path}: {counts}", *lines]))
    return 1 if found["problems"] else 0


def verify(path: Path) -> dict[str, Any]:
    """Counts and problems of a dataset folder. Raises ConfigError when it is none."""
    dataset = Dataset(path)
    facts: dict[str, Any] = {"path": str(path), "shards": 0, "documents": 0, "tokens": 0, "problems": []}
    problems: list[str] = facts["problems"]
    known = dataset.manifest["tokenizer"]
    try:
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        if (tokenizer.fingerprint, tokenizer.vocab_size) != (known["sha256"], known["vocab_size"]):
            problems.append("tokenizer.json is another one than the manifest's")
    except ConfigError as error:
        problems.append(str(error))
    entries = [(s, n, splits[s]) for n, splits in dataset.manifest["sources"].items() for s in ("train", "validation")]
    total = sum(entry["tokens"] for _, _, entry in entries)
    with progress("verify", total) as show:
        for split, name, entry in entries:
            documents = tokens = 0
            for said in entry["shards"]:
                try:
                    shard = Shard(path / split / name / said["name"])
                except ConfigError as error:
                    problems.append(str(error))
                    continue
                problems += [f"{shard.bin_path}: {problem}" for problem in _shard_problems(shard, said, known)]
                facts["shards"] += 1
                documents, tokens = documents + shard.num_documents, tokens + shard.num_tokens
                show(facts["tokens"] + tokens, f"{facts['tokens'] + tokens:,} tokens")
            if (documents, tokens) != (entry["documents"], entry["tokens"]):
                says = f"the manifest says {entry['documents']:,} and {entry['tokens']:,}"
                problems.append(f"{split}/{name}: has {documents:,} documents and {tokens:,} tokens, {says}")
            facts["documents"], facts["tokens"] = facts["documents"] + documents, facts["tokens"] + tokens
    if not problems:
        problems += _order_problems(dataset)
    return facts


def _shard_problems(shard: Shard, said: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """Checksum, ids, and the EOS that every document with tokens must end with."""
    digest, highest = hashlib.sha256(), -1
    for first in range(0, shard.num_tokens, CHUNK_TOKENS):
        tokens = shard.read(first, min(CHUNK_TOKENS, shard.num_tokens - first))
        digest.update(tokens.data)
        highest = max(highest, int(tokens.max()))
        if int(tokens.min()) < 0:
            yield "holds negative ids"
    digest.update(shard.document_lengths.tobytes())
    if digest.hexdigest() != said["sha256"]:
        yield "has changed since it was written (SHA-256). Prepare the dataset again, or copy the file again"
    if highest >= known["vocab_size"]:
        yield f"holds id {highest}, but the tokenizer has {known['vocab_size']} ids"
    ends = shard.document_lengths.astype(np.int64).cumsum()
    if len(ends) and int(ends[-1]) != shard.num_tokens:
        yield f"its documents have {int(ends[-1]):,} tokens, the file {shard.num_tokens:,}"
    elif known["eos"] is not None:
        last = shard.tokens[ends[shard.document_lengths > 0] - 1]
        if missing := int(np.count_nonzero(last != known["eos"])):
            yield f"{missing:,} of {len(last):,} documents do not end with EOS ({known['eos']})"


def _order_problems(dataset: Dataset) -> Iterator[str]:
    """The order's own test: an epoch, or a million rows of it, takes every row once."""
    counts = [s["tokens"] for splits in dataset.manifest["sources"].values() for s in splits["train"]["shards"]]
    order = Order([Source(dataset.train_hash, tuple(counts))], seq_len=64)
    rows = min(order.epoch_samples, 1_000_000)
    if len(np.unique(order.spans(np.arange(rows)).starts)) != rows:
        yield f"the order repeats a row among the first {rows:,} of an epoch: a defect of franca on this machine"

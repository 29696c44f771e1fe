"""The start of the loader on a plan of 10^12 tokens: seconds and memory of a fresh process up to its first batch.

The dataset is a thousand shards of 10^9 tokens. Their `.bin` files are holes; they share the bytes of one real index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.table import Row, say
from franca.data.indexed import HEADER, MAGIC

REQUIRED_S, REQUIRED_MB = 1.0, 200.0
SHARDS, SHARD_TOKENS, DOCUMENTS = 1000, 10**9, 1_000_000

PROBE = """
import time
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
import sys
begin = time.perf_counter()
import json
from franca.core.schedule import Timeline, batch_stages
from franca.data.loader import DataConfig, Loader, SourceConfig, open_plan
imported, before = time.perf_counter(), peak()
plan = open_plan(DataConfig(sources=(SourceConfig(path=sys.argv[1]),), attention=sys.argv[2]))
timeline = Timeline(batch_stages(512, None), 2048, plan.order.epoch_samples)
batch = Loader(plan.order, plan.shards, timeline, plan.order.epoch_samples, sys.argv[2]).batch(0, 0, 1)
done = time.perf_counter()
assert "torch" not in sys.modules and batch.tokens_BT.shape == (512, 2048)
tokens = sum(source.num_tokens for source in plan.order.sources)
print(json.dumps([imported - begin, done - imported, before, peak(), tokens]))
"""


def rows(root: Path) -> list[Row]:
    folder = _dataset(root / "trillion")
    return [row for attention in ("causal", "document") for row in _measure(folder, attention)]


def _measure(folder: Path, attention: str) -> list[Row]:
    found = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", PROBE, str(folder), attention], check=True, capture_output=True, text=True
        )
        found.append(json.loads(output.stdout))
    imports_s, seconds, before, total = (float(np.median(column)) for column in list(zip(*found, strict=True))[:4])
    say(f"start on {found[0][4]:.1e} tokens, {attention}: imports {imports_s:.2f} s, then {seconds:.2f} s")
    time_row = Row(
        f"start on 10^12 tokens, {attention}",
        f"{seconds:.2f} s (+ imports {imports_s:.2f} s)",
        requirement=f"< {REQUIRED_S:.0f} s",
        meets=seconds < REQUIRED_S,
    )
    memory = f"{total:.0f} MB (imports {before:.0f}, loader {total - before:.0f})"
    return [time_row, Row("  peak memory", memory, requirement=f"< {REQUIRED_MB:.0f} MB", meets=total < REQUIRED_MB)]


def _dataset(folder: Path) -> Path:
    """10^12 tokens in next to no space."""
    say("writing an index of 10^12 tokens")
    source = folder / "train" / "web"
    source.mkdir(parents=True)
    cuts = np.sort(np.random.default_rng(0).integers(0, SHARD_TOKENS, DOCUMENTS - 1))
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [SHARD_TOKENS]])).astype(np.int32)
    header = HEADER.pack(MAGIC, 1, 8, DOCUMENTS, DOCUMENTS + 1)
    bounds = np.arange(DOCUMENTS + 1, dtype=np.int64)
    index = source / "00000.idx"
    index.write_bytes(header + lengths.tobytes() + (starts * 2).astype(np.int64).tobytes() + bounds.tobytes())
    for number in range(SHARDS):
        with open(source / f"{number:05d}.bin", "wb") as file:
            file.truncate(SHARD_TOKENS * 2)
        if number:
            os.link(index, source / f"{number:05d}.idx")
    train = {"documents": SHARDS * DOCUMENTS, "tokens": SHARDS * SHARD_TOKENS, "bytes": 4 * SHARDS * SHARD_TOKENS}
    none = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    tokenizer = {"sha256": "0" * 64, "vocab_size": 65536, "bos": None, "eos": 0}
    shards = [{"name": f"{number:05d}", "tokens": SHARD_TOKENS, "sha256": "0" * 64} for number in range(SHARDS)]
    sources = {"web": {"train": {**train, "shards": shards}, "validation": none, "skipped": 0}}
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "tokenizer": tokenizer, "sources": sources}))
    return folder

"""The loader: tokens per second of batches in random order, from the page cache, on one core."""

import statistics
import time
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.table import Row, say
from franca.core.schedule import Timeline, batch_stages
from franca.data.indexed import Shard, ShardWriter
from franca.data.loader import Loader
from franca.data.order import Order, Source

REQUIRED = 50e6
SHARDS, SHARD_TOKENS, DOCUMENT_TOKENS = 2, 100_000_000, 1000
BATCH_TOKENS, ROUNDS, ROUND_TOKENS = 131_072, 5, 20_000_000


def rows(root: Path) -> list[Row]:
    shards = [_write(root / "tokens" / str(number), number) for number in range(SHARDS)]
    for shard in shards:
        shard.tokens.max()  # into the page cache
    modes: tuple[Literal["causal", "document"], ...] = ("causal", "document")
    return [_measure(shards, seq_len, attention) for attention in modes for seq_len in (2048, 512)]


def _write(prefix: Path, seed: int) -> Shard:
    """Random token ids of 16 bits, in documents of random lengths."""
    say(f"writing {SHARD_TOKENS:,} random tokens")
    generator = np.random.default_rng(seed)
    writer = ShardWriter(prefix, np.dtype(np.uint16))
    for _ in range(SHARD_TOKENS // 1_000_000):
        tokens = generator.integers(0, 65536, 1_000_000, dtype=np.uint16)
        cuts = np.sort(generator.integers(0, 1_000_000, 1_000_000 // DOCUMENT_TOKENS - 1))
        writer.add(tokens, np.diff(cuts, prepend=0, append=1_000_000))
    writer.commit()
    return Shard(prefix)


def _measure(shards: list[Shard], seq_len: int, attention: Literal["causal", "document"]) -> Row:
    order = Order([Source("random", tuple(shard.num_tokens for shard in shards))], seq_len)
    batch = BATCH_TOKENS // seq_len
    timeline = Timeline(batch_stages(batch, None), seq_len, order.epoch_samples)
    loader = Loader(order, [shards], timeline, order.epoch_samples, attention)
    steps = ROUND_TOKENS // BATCH_TOKENS
    speeds = []
    for number in range(ROUNDS):
        begin = time.perf_counter()
        for step in range(number * steps, (number + 1) * steps):
            loader.batch(step, 0, 1)
        speeds.append(steps * BATCH_TOKENS / (time.perf_counter() - begin))
    speed = statistics.median(speeds)
    name = f"loader, {attention}, {seq_len} x {batch}"
    shown = f"{speed / 1e6:.0f}M (best {max(speeds) / 1e6:.0f}M) tokens/s"
    say(f"{name}: {shown}")
    if attention == "document":
        return Row(name, shown)
    return Row(name, shown, ratio=speed / REQUIRED, requirement=">= 50M tokens/s", meets=speed >= REQUIRED)

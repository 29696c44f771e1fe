"""Shards of given documents, written and read back by the real parts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from franca.data.indexed import Shard, ShardWriter

WriteShards = Callable[..., list[Shard]]


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """`write(folder, groups)`: one shard for each group of documents; a document is a list of token ids."""

    def write(folder: Path, groups: Sequence[Sequence[Sequence[int]]], dtype: type = np.int32) -> list[Shard]:
        prefixes = [folder / f"{number:05d}" for number in range(len(groups))]
        for prefix, documents in zip(prefixes, groups, strict=True):
            writer = ShardWriter(prefix, np.dtype(dtype))
            writer.add([np.array(document, np.int64) for document in documents])
            writer.commit()
        return [Shard(prefix) for prefix in prefixes]

    return write

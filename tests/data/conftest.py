"""Shards of given documents, written and read back by the real parts, and settings of small preparations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preparing import TEXTS

from franca.data.indexed import Shard, ShardWriter
from franca.data.prepare import PrepareConfig, TokenizerConfig
from franca.data.sources import CorpusConfig
from franca.data.tokenizer import Tokenizer

WriteShards = Callable[..., list[Shard]]


@pytest.fixture(scope="session")
def write_shards() -> WriteShards:
    """`write(folder, groups)`: one shard for each group of documents; a document is a list of token ids."""

    def write(folder: Path, groups: Sequence[Sequence[Sequence[int]]], dtype: type = np.int32) -> list[Shard]:
        prefixes = [folder / f"{number:05d}" for number in range(len(groups))]
        for prefix, documents in zip(prefixes, groups, strict=True):
            writer = ShardWriter(prefix, np.dtype(dtype))
            tokens = [token for document in documents for token in document]
            writer.add(np.array(tokens, np.int64), np.array(list(map(len, documents)), np.int64))
            writer.commit()
        return [Shard(prefix) for prefix in prefixes]

    return write


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` of 300 tokens, learned from TEXTS."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(Tokenizer.train(iter(TEXTS), 300).json, encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, tokenizer_path: Path) -> Callable[..., PrepareConfig]:
    """`make(pattern, output="out", **settings)`: the settings of a small preparation of the files in tmp_path."""

    def settings(*patterns: str, output: str = "out", corpus: dict[str, Any] | None = None, **changes: Any) -> PrepareConfig:
        paths = tuple(str(tmp_path / pattern) for pattern in patterns)
        values = {"tokenizer": TokenizerConfig(path=str(tokenizer_path)), "validation_share": 0.2} | changes
        sources = {"mine": CorpusConfig(paths=paths, **(corpus or {}))}
        return PrepareConfig(output=str(tmp_path / output), **({"sources": sources} | values))

    return settings

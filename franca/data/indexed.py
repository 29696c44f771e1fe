"""Token shards on disk: Megatron-LM's `.bin/.idx` bytes, and the dataset folder that holds them.

The only file that knows these bytes. `.bin`: token ids back to back, little endian. `.idx`: magic, version, dtype code,
counts, int32 lengths, int64 byte offsets, int64 document bounds. One sequence is one document. Opening a shard reads a
few bytes of its index; tokens are read through a memory map.

A dataset folder: `manifest.json` (written last: without it the folder is not a dataset), `tokenizer.json`,
`train/<source>/NAME.{bin,idx}`, `validation/<source>/NAME.{bin,idx}`, and `units/` with a record of every piece of the work.
"""

import hashlib
import json
import os
import struct
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from franca.core.errors import ConfigError
from franca.core.run import write_atomically

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
DTYPES: dict[int, type] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
    6: np.float64,
    7: np.float32,  # token ids for want of uint16, in old files; to some, 7 is float64
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, int32 otherwise. Raises ConfigError where that is too small as well."""
    if vocab_size > 2**31:
        raise ConfigError(f"tokenizer: its highest id is {vocab_size - 1:,}, but ids must be below {2**31:,}. Number them anew")
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.int32)


class Shard:
    """One `.bin/.idx` pair, opened by its path without suffix. Raises ConfigError when it is missing, foreign or truncated."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        try:
            bin_bytes = self.bin_path.stat().st_size
            with open(self.idx_path, "rb") as file:
                self.dtype, self.num_documents = self._parse(file.read(HEADER.size), self.idx_path.stat().st_size)
                tokens_end = self._last_end(file, bin_bytes)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read ({error.strerror}). Is the dataset whole?") from None
        if tokens_end != bin_bytes:
            reason = "it is truncated or belongs to another index. Prepare the dataset again or copy the file again."
            raise ConfigError(f"{self.bin_path}: has {bin_bytes} bytes, but its index says {tokens_end}: {reason}")
        self.num_tokens = bin_bytes // self.dtype.itemsize

    def _parse(self, header: bytes, idx_bytes: int) -> tuple[np.dtype[Any], int]:
        if header.startswith(LEGACY_MAGIC):
            advice = "Prepare the text again, or convert the file with Megatron-LM's --dataset-impl mmap."
            raise ConfigError(f"{self.idx_path}: is in the legacy fairseq format (TNTIDX), which is not read. {advice}")
        if not MAGIC.startswith(header[: len(MAGIC)]):
            raise ConfigError(f"{self.idx_path}: wrong magic {header[:9]!r}, expected {MAGIC!r}: is not a Megatron index")
        if len(header) < HEADER.size:
            raise ConfigError(f"{self.idx_path}: has {idx_bytes} bytes, not even a header of {HEADER.size}: it is truncated")
        _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
        if version != 1:
            raise ConfigError(f"{self.idx_path}: index version {version} is not known; expected 1")
        if code not in DTYPES:
            raise ConfigError(f"{self.idx_path}: dtype code {code} holds no token ids; expected one of {sorted(DTYPES)}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if idx_bytes != expected:
            raise ConfigError(f"{self.idx_path}: has {idx_bytes} bytes, expected {expected}: it is truncated")
        return np.dtype(DTYPES[code]), num_sequences

    def _last_end(self, idx: IO[bytes], bin_bytes: int) -> int:
        """The byte at which the last document ends, by the index; decides what dtype code 7 means."""
        if self.num_documents == 0:
            return 0
        idx.seek(HEADER.size + 4 * self.num_documents - 4)
        (length,) = struct.unpack("<i", idx.read(4))
        idx.seek(HEADER.size + 12 * self.num_documents - 8)
        (offset,) = struct.unpack("<q", idx.read(8))
        if self.dtype == np.float32 and offset + 8 * length == bin_bytes:
            self.dtype = np.dtype(np.float64)
        return int(offset) + int(length) * self.dtype.itemsize

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All tokens, memory-mapped: (num_tokens,)."""
        if self.num_tokens == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.bin_path, self.dtype, "r").view(np.ndarray)  # which is sliced ten times as fast as a memmap

    @cached_property
    def _idx(self) -> int:
        """The index as an open file descriptor. It is read, not mapped: a search through mapped gigabytes would hold them."""
        descriptor = os.open(self.idx_path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    @cached_property
    def _every_1024th(self) -> NDArray[np.int64]:
        """The byte at which every 1024th document begins."""
        offsets = np.memmap(self.idx_path, np.int64, "r", HEADER.size + 4 * self.num_documents, (self.num_documents,))
        return np.array(offsets[::1024])

    @cached_property
    def document_lengths(self) -> NDArray[np.int32]:
        """Tokens of every document, memory-mapped: (num_documents,)."""
        if self.num_documents == 0:
            return np.empty(0, np.int32)
        return np.memmap(self.idx_path, np.int32, "r", HEADER.size, (self.num_documents,)).view(np.ndarray)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from token `start` on, without a copy: (count,)."""
        return self.tokens[start : start + count]

    def boundaries(self, start: int, count: int) -> list[int]:
        """Where documents begin in [start, start + count), counted from `start`; empty documents repeat a position."""
        begin, end = start * self.dtype.itemsize, (start + count) * self.dtype.itemsize
        begins: list[int] = []
        for first in range(1024 * max(0, int(self._every_1024th.searchsorted(begin)) - 1), self.num_documents, 1024):
            where = HEADER.size + 4 * self.num_documents + 8 * first
            offsets = np.frombuffer(os.pread(self._idx, 8 * min(1024, self.num_documents - first), where), np.int64)
            inside = offsets[offsets.searchsorted(begin) : offsets.searchsorted(end)]
            begins += ((inside - begin) // self.dtype.itemsize).tolist()
            if offsets[-1] >= end:
                break
        return begins


class ShardWriter:
    """Writes one `.bin/.idx` pair. It is no shard before `commit`, which writes the index, at once and last."""

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed by commit, or by who gives up)
        self.lengths: list[NDArray[np.int32]] = []
        self.num_tokens = 0
        self.hash = hashlib.sha256()

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.integer[Any]]) -> None:
        """Append documents: their token ids back to back, and how many each has; empty ones are kept."""
        if (longest := int(lengths.max(initial=0))) >= 2**31:
            advice = "Cut the text, for example with documents: paragraph"
            raise ConfigError(f"{self.prefix}: a document of {longest:,} tokens is longer than an index can say. {advice}")
        content = tokens.astype(self.dtype, casting="unsafe").data
        self.hash.update(content)
        self.file.write(content)
        self.lengths.append(lengths.astype(np.int32))
        self.num_tokens += len(tokens)

    def commit(self) -> str:
        """Make the pair a shard; returns the SHA-256 of its tokens' bytes and then its documents' lengths (int32)."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        lengths = np.concatenate(self.lengths) if self.lengths else np.empty(0, np.int32)
        self.hash.update(lengths.tobytes())
        bytes_before = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        bounds = np.arange(len(lengths) + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(lengths), len(bounds))
        write_atomically(Path(f"{self.prefix}.idx"), header + lengths.tobytes() + bytes_before.tobytes() + bounds.tobytes())
        return self.hash.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: what its manifest says, and its shards. Raises ConfigError when the folder is no finished dataset."""

    root: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        path = self.root / "manifest.json"
        if not self.root.is_dir():
            raise ConfigError(f"{self.root}: no such dataset folder. Make one with: franca prepare <data.yaml>")
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ConfigError(f"{self.root}: has no manifest.json: it is no finished dataset. Run: franca prepare") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: is not valid JSON ({error}). Prepare the dataset again.") from None

    @property
    def tokenizer_path(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def train_hash(self) -> str:
        """A hash of all training tokens and documents: the dataset's identity, whatever its folder is called."""
        hashes = [[shard["sha256"] for shard in entry["train"]["shards"]] for entry in self.manifest["sources"].values()]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    def shards(self, split: str, source: str) -> list[Shard]:
        """The shards of one source in the manifest's order; split is `train` or `validation`."""
        entry = self.manifest["sources"][source][split]
        shards = [Shard(self.root / split / source / shard["name"]) for shard in entry["shards"]]
        found = sum(shard.num_tokens for shard in shards)
        if found != entry["tokens"]:
            wrong = f"holds {found} tokens, but the manifest says {entry['tokens']}"
            raise ConfigError(f"{self.root / split / source}: {wrong}. Prepare the dataset again.")
        return shards


@dataclass(frozen=True)
class BareShard(Dataset):
    """One `.bin/.idx` pair without a folder around it, as Megatron-LM and datatrove leave it; `root` is its path, no suffix.

    It stands for a dataset of one source without a held-out set. Its tokens are known by their number, the index and a
    sample: to read them all at every start would take too long.
    """

    tokenizer: Path  # the tokenizer.json that it was made with, and what that says:
    fingerprint: str
    vocab_size: int
    eos: int | None

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer

    @cached_property
    def manifest(self) -> dict[str, Any]:
        shard = Shard(self.root)
        lengths = shard.document_lengths
        ends = np.cumsum(lengths[lengths > 0][:100], dtype=np.int64)
        tokens = shard.tokens[: int(ends[-1]) if len(ends) else 0]
        sample = np.concatenate([shard.tokens[:1_000_000], shard.tokens[-1_000_000:]])
        if not shard.num_tokens:
            raise ConfigError(f"{shard.bin_path}: holds no tokens")
        if sample.min() < 0 or sample.max() >= self.vocab_size:
            given = f"holds ids from {sample.min()} to {sample.max()}, but {self.tokenizer} has {self.vocab_size:,} tokens"
            raise ConfigError(f"{shard.bin_path}: {given}. Give the tokenizer that it was made with.")
        digest = hashlib.sha256(sample.tobytes() + lengths[:1_000_000].tobytes() + lengths[-1_000_000:].tobytes())
        digest.update(f"{shard.num_tokens} {shard.num_documents}".encode())
        entry = {"name": self.root.name, "tokens": shard.num_tokens, "sha256": digest.hexdigest()}
        counts = {"documents": shard.num_documents, "tokens": shard.num_tokens, "bytes": 0}
        none = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
        eos = self.eos if bool((tokens[ends - 1] == self.eos).all()) else None
        return {
            "tokenizer": {"sha256": self.fingerprint, "vocab_size": self.vocab_size, "bos": None, "eos": eos},
            "sources": {self.root.name: {"train": {**counts, "shards": [entry]}, "validation": none}},
        }

    def shards(self, split: str, source: str) -> list[Shard]:
        return [Shard(self.root)] if split == "train" else []

"""The bytes of Megatron-LM's `.bin/.idx`, and every way in which they can be wrong."""

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.errors import ConfigError
from franca.data.indexed import Dataset, Shard, ShardWriter, token_dtype

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
DOCUMENTS = [[5, 6, 7], [], [65_535], [1, 2]]


def packed_index(lengths, code, itemsize):
    """The index, packed field by field."""
    offsets = [itemsize * sum(lengths[:number]) for number in range(len(lengths))]
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1)
    body = b"".join(struct.pack("<i", length) for length in lengths) + b"".join(struct.pack("<q", o) for o in offsets)
    return head + body + b"".join(struct.pack("<q", bound) for bound in range(len(lengths) + 1))


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.int32, 4, "i"), (np.uint16, 8, "H")])
@pytest.mark.parametrize("documents", [DOCUMENTS, [], [[]], [[1]]])
def test_a_shard_has_megatrons_bytes(write_shards, tmp_path, dtype, code, letter, documents):
    (shard,) = write_shards(tmp_path, [documents], dtype)
    tokens = [token for document in documents for token in document]
    size = struct.calcsize(f"<{letter}")
    assert shard.idx_path.read_bytes() == packed_index([len(document) for document in documents], code, size)
    assert shard.bin_path.read_bytes() == struct.pack(f"<{len(tokens)}{letter}", *tokens)
    assert (shard.num_tokens, shard.num_documents, shard.dtype) == (len(tokens), len(documents), np.dtype(dtype))
    assert shard.read(0, len(tokens)).tolist() == tokens


@pytest.mark.parametrize(
    ("code", "letter", "dtype"),
    [(1, "B", np.uint8), (2, "b", np.int8), (3, "h", np.int16), (4, "i", np.int32), (5, "q", np.int64), (8, "H", np.uint16)],
)
def test_every_integer_dtype_of_a_foreign_index_is_read(tmp_path, code, letter, dtype):
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<5{letter}", 1, 2, 3, 4, 127))
    (tmp_path / "x.idx").write_bytes(packed_index([2, 3], code, struct.calcsize(letter)))
    shard = Shard(tmp_path / "x")
    assert (shard.dtype, shard.read(1, 4).tolist(), shard.boundaries(0, 5)) == (np.dtype(dtype), [2, 3, 4, 127], [0, 2])


def test_ids_are_two_bytes_wide_where_every_id_fits():
    assert [token_dtype(size) for size in (1, 65_536, 65_537)] == [np.uint16, np.uint16, np.int32]


def flat(documents):
    """Documents as `add` takes them: their tokens back to back, and how many each has."""
    tokens = [token for document in documents for token in document]
    return np.array(tokens, np.int64), np.array(list(map(len, documents)), np.int64)


def test_adding_in_pieces_is_adding_at_once(tmp_path):
    whole, pieces = ShardWriter(tmp_path / "whole", np.dtype(np.int32)), ShardWriter(tmp_path / "pieces", np.dtype(np.int32))
    whole.add(*flat(DOCUMENTS))
    for document in DOCUMENTS:
        pieces.add(*flat([document]))
        pieces.add(*flat([]))
    assert whole.num_tokens == pieces.num_tokens == 6
    assert whole.commit() == pieces.commit()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"pieces{suffix}").read_bytes()


def test_the_hash_of_a_shard_is_of_its_tokens_and_of_where_its_documents_end(tmp_path):
    def hash_of(documents, dtype=np.uint16):
        writer = ShardWriter(tmp_path / "x", np.dtype(dtype))
        writer.add(*flat(documents))
        return writer.commit()

    tokens, lengths = struct.pack("<6H", 5, 6, 7, 65_535, 1, 2), struct.pack("<4i", 3, 0, 1, 2)
    assert hash_of(DOCUMENTS) == hashlib.sha256(tokens + lengths).hexdigest()
    others = [[[5, 6, 7, 65_535, 1, 2]], [[5, 6, 7], [], [65_535], [1, 3]], DOCUMENTS[::-1]]
    assert len({hash_of(DOCUMENTS), *map(hash_of, others)}) == 4


def test_it_is_no_shard_before_the_commit(tmp_path):
    writer = ShardWriter(tmp_path / "deep" / "00000", np.dtype(np.int32))
    writer.add(np.arange(100_000), np.array([100_000]))
    assert os.listdir(tmp_path / "deep") == ["00000.bin"]
    with pytest.raises(ConfigError, match=r"00000\.idx"):
        Shard(writer.prefix)
    writer.commit()
    assert sorted(os.listdir(tmp_path / "deep")) == ["00000.bin", "00000.idx"]


@PROPERTY
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=15), draw=st.data())
def test_boundaries_agree_with_a_naive_loop(write_shards, lengths, draw):
    total = sum(lengths)
    start = draw.draw(st.integers(0, total))
    count = draw.draw(st.integers(0, total - start))
    begins = [sum(lengths[:number]) for number in range(len(lengths))]
    with tempfile.TemporaryDirectory() as folder:
        (shard,) = write_shards(Path(folder), [[[1] * length for length in lengths]])
        found = shard.boundaries(start, count)
    assert found == [begin - start for begin in begins if start <= begin < start + count]


def truncate(path, removed):
    path.write_bytes(path.read_bytes()[:-removed])


def overwrite(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def drop_header(path):
    path.write_bytes(path.read_bytes()[:20])


SPOILED = {
    "bin truncated": (".bin", lambda path: truncate(path, 2), r"has 10 bytes, but its index says 12: it is truncated"),
    "bin too long": (".bin", lambda path: path.write_bytes(bytes(14)), r"has 14 bytes, but its index says 12"),
    "bin empty": (".bin", lambda path: path.write_bytes(b""), r"has 0 bytes, but its index says 12"),
    "bin missing": (".bin", Path.unlink, r"cannot be read \(No such file or directory\)"),
    "idx missing": (".idx", Path.unlink, r"cannot be read \(No such file or directory\)"),
    "idx truncated": (".idx", lambda path: truncate(path, 8), r"has 114 bytes, expected 122: it is truncated"),
    "idx header cut": (".idx", drop_header, r"has 20 bytes, not even a header of 34: it is truncated"),
    "idx empty": (".idx", lambda path: path.write_bytes(b""), r"has 0 bytes, not even a header of 34: it is truncated"),
    "wrong magic": (".idx", lambda path: overwrite(path, 0, b"XXIDIDX"), r"wrong magic b'XXIDIDX.*is not a Megatron index"),
    "legacy": (".idx", lambda path: overwrite(path, 0, b"TNTIDX\0\0"), r"legacy fairseq format \(TNTIDX\)"),
    "wrong version": (".idx", lambda path: overwrite(path, 9, b"\x02"), r"index version 2 is not known; expected 1"),
    "unknown dtype": (".idx", lambda path: overwrite(path, 17, b"\x63"), r"dtype code 99 holds no token ids"),
    "other dtype": (".idx", lambda path: overwrite(path, 17, b"\x04"), r"has 12 bytes, but its index says"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_shard_is_refused_by_a_message_that_names_the_file(write_shards, tmp_path, case):
    suffix, spoil, message = SPOILED[case]
    (shard,) = write_shards(tmp_path, [DOCUMENTS], np.uint16)
    spoil(tmp_path / f"00000{suffix}")
    with pytest.raises(ConfigError, match=message) as caught:
        Shard(shard.prefix)
    named = ".bin" if case == "other dtype" else suffix
    assert str(caught.value).startswith(str(tmp_path / f"00000{named}:"))


def make_dataset(write_shards, root, tokens=6):
    write_shards(root / "train" / "x", [[[3, 4, 5], [6]], [[1, 2]]])
    train = {"shards": [{"name": "00001", "tokens": 2}, {"name": "00000", "tokens": 4}], "tokens": tokens}
    manifest = {"sources": {"x": {"train": train, "validation": {"shards": [], "tokens": 0}}}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return Dataset(root)


def test_a_dataset_gives_its_shards_in_the_order_of_the_manifest(write_shards, tmp_path):
    dataset = make_dataset(write_shards, tmp_path)
    assert [shard.read(0, 9).tolist() for shard in dataset.shards("train", "x")] == [[1, 2], [3, 4, 5, 6]]
    assert dataset.shards("validation", "x") == []


def test_a_dataset_whose_shards_do_not_hold_what_the_manifest_says_is_refused(write_shards, tmp_path):
    with pytest.raises(ConfigError, match="train/x: holds 6 tokens, but the manifest says 7"):
        make_dataset(write_shards, tmp_path, tokens=7).shards("train", "x")


def test_a_folder_that_is_no_finished_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="none: no such dataset folder"):
        _ = Dataset(tmp_path / "none").manifest
    with pytest.raises(ConfigError, match=r"has no manifest\.json: it is no finished dataset"):
        _ = Dataset(tmp_path).manifest
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json: is not valid JSON"):
        _ = Dataset(tmp_path).manifest
